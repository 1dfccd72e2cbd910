"""The commands about training: finetune, export and plan."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_model
from diffusionfm.cli.parts import CAPTIONS_HELP, add_command
from diffusionfm.data.captions import CHOICES
from diffusionfm.gpus import KNOWN, check_gpu
from diffusionfm.lora import parse_lora

METHODS = ("lora", "dora", "full")  # of diffusionfm.finetune, which imports torch
PRESETS = ("laptop", "gpu", "multi-gpu")


def finetune(args: argparse.Namespace) -> int:
    """`diffusionfm finetune`."""
    if not args.data.exists():
        raise ValueError(f"no such folder: {args.data}")
    check_model(args.model)
    names = (
        "steps",
        "rank",
        "lr",
        "captions",
        "method",
        "text_encoder",
        "trigger",
        "prior",
        "patience",
        "sample_every",
    )
    chosen = {name: getattr(args, name) for name in names}
    for name in ("steps", "rank", "lr"):
        if chosen[name] is not None and not chosen[name] > 0:
            raise ValueError(f"{name} must be above 0, got {chosen[name]}")
    from diffusionfm.finetune import check, configure, run

    chosen |= {"model": args.model, "seed": args.seed, "prompts": args.prompt or None}
    cfg = configure(args.data, args.out, preset=args.preset, **chosen)
    say = _silent if args.quiet else print
    if args.check:
        check(cfg, say)
        print(f"{args.out}: preflight.json and preflight.png; leave out --check to train")
        return 0
    run(cfg, say=say, bar=not args.quiet)
    use = "--model" if cfg.method == "full" else "--lora"
    print(f'{args.out}: use it with  diffusionfm generate "..." {use} {args.out}')
    return 0


def export(args: argparse.Namespace) -> int:
    """`diffusionfm export`."""
    check_model(args.model)
    source, scale = parse_lora(args.lora)
    from diffusionfm.finetune.export import export as run

    difference = run(source, args.out, args.to, model=args.model, scale=scale)
    print(f"{args.out}: loaded back, its picture differs by at most {difference} of 255")
    return 0


def _silent(text: str) -> None:
    """Say nothing."""


def plan(args: argparse.Namespace) -> int:
    """`diffusionfm plan`."""
    check_gpu(args.gpu)
    if not args.config.is_file():
        raise ValueError(f"no such config: {args.config} (plan reads those of train/denoiser.py)")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch is 1 or more pictures, not {args.batch}")
    from diffusionfm.config import ConfigError, load_config
    from diffusionfm.plan import launch_line, predict, table

    try:
        cfg = load_config(_recipe("denoiser").DenoiserConfig, args.config, args.overrides)
    except ConfigError as error:
        raise ValueError(f"{error} (plan reads configs of train/denoiser.py)") from error
    found = predict(cfg, args.gpus, args.gpu, args.batch)
    overrides = [*args.overrides, *([f"trainer.batch_size={args.batch}"] if args.batch else [])]
    launch = launch_line(str(args.config), found, overrides)
    if args.json:
        print(json.dumps({**found.as_dict(), "launch": launch}))
    else:
        print(f"{table(found, str(args.config))}\nstart it     {launch}")
    return 0


def _recipe(name: str) -> Any:
    """A recipe's module, from the wheel's diffusionfm.train or the checkout's train folder."""
    if importlib.util.find_spec("diffusionfm.train") is not None:
        return importlib.import_module(f"diffusionfm.train.{name}")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "train" / f"{name}.py").is_file():
        raise ValueError("the recipes are missing: install the package again")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(f"train.{name}")


def add_finetune(commands: Any) -> None:
    command = add_command(
        commands,
        "finetune",
        finetune,
        "adapt the model to your pictures and captions; the same command again goes on where it stopped",
        "finetune my-pictures --out my-style --check           # only look at the pictures",
        "finetune my-pictures --out my-style",
        "finetune my-dog.zip --out my-dog --captions trigger --trigger zkw --prior 1",
    )
    command.add_argument(
        "data",
        type=Path,
        help="pictures with .txt beside them, metadata.jsonl or a CSV, an imagefolder; a .zip of one; or shards",
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets the LoRA and report.html; --lora DIR uses it",
    )
    command.add_argument(
        "--model", metavar="DIR", help="the model to start from (default: the shipped model)"
    )
    command.add_argument("--check", action="store_true", help="report on the pictures, train nothing")
    command.add_argument(
        "--preset",
        default="laptop",
        choices=PRESETS,
        help="steps, rank, batch for the machine (default laptop: 10 to 50 pictures, minutes on two cores)",
    )
    command.add_argument(
        "--method", choices=METHODS, help="what is trained (default lora; full: every weight)"
    )
    command.add_argument("--text-encoder", action="store_true", help="adapt the text encoder too")
    command.add_argument("--captions", choices=CHOICES, help=CAPTIONS_HELP)
    command.add_argument(
        "--trigger", metavar="WORD", help="the subject's name, for [trigger] in captions and prompts"
    )
    command.add_argument(
        "--prior",
        type=float,
        help="weight of pictures the model draws itself, so that it forgets less (default 0)",
    )
    command.add_argument(
        "--prompt",
        action="append",
        help="what the sample sheets draw (default: some captions); several times",
    )
    command.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    command.add_argument(
        "--patience", type=int, help="validations without a better loss to stop after, 0 never"
    )
    command.add_argument("--rank", type=int, help="LoRA rank (default: the preset's)")
    command.add_argument("--lr", type=float, help="learning rate (default: the preset's)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--sample-every", type=int, metavar="N", help="steps from sheet to sheet (default: the preset's)"
    )
    command.add_argument("--quiet", action="store_true", help="no report on the pictures and no progress bar")


def add_export(commands: Any) -> None:
    command = add_command(
        commands,
        "export",
        export,
        "take a LoRA elsewhere: a whole model folder, or one file for kohya's tools and ComfyUI",
        "export my-style --to merged --out my-model            # then: generate ... --model my-model",
        "export my-style --to kohya --out my-style.safetensors",
    )
    command.add_argument("lora", metavar="DIR[:SCALE]", help="what finetune wrote")
    command.add_argument("--to", required=True, choices=("merged", "kohya"))
    command.add_argument("--out", type=Path, required=True, help="a new folder, or a new .safetensors file")
    command.add_argument(
        "--model", metavar="DIR", help="the model it was trained on (default: the shipped one)"
    )


def add_plan(commands: Any) -> None:
    command = add_command(
        commands,
        "plan",
        plan,
        "predict memory, speed, GPU-hours and energy of a denoiser run before it is paid for",
        "plan configs/photo/denoiser-256.yaml --gpus 64 --gpu h100",
        "plan configs/icons/denoiser.yaml --gpu cpu",
        "plan configs/photo/denoiser-512.yaml trainer.sharding=fsdp --gpus 8 --gpu a100-80 --batch 256 --json",
    )
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="a config of train/denoiser.py")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides a key of the config; must directly follow CONFIG.yaml",
    )
    command.add_argument("--gpus", type=int, default=1, help="how many, in machines of 8 (default 1)")
    command.add_argument(
        "--gpu", default="h100", help=f"{', '.join(KNOWN)}; the last is measured now (default h100)"
    )
    command.add_argument(
        "--batch",
        type=int,
        help="pictures per step over all GPUs, with buckets what a step's are a multiple of (default: the config's)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
