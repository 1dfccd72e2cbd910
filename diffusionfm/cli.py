"""The `diffusionfm` command. Arguments are checked before anything heavy is imported.

Exit codes: 0 done, 1 some pictures of a batch failed or shards are damaged, 2 a mistake in the call (one line
`error: ...` says how to mend it), 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffusionfm import __version__
from diffusionfm.checks import check_model, check_prompt, check_seed, check_settings


class Parser(argparse.ArgumentParser):
    """Errors are one line; help keeps the examples' line breaks."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------ generate


def generate(args: argparse.Namespace) -> int:
    """`diffusionfm generate`."""
    start = time.monotonic()
    check_prompt(args.prompt)
    check_prompt(args.negative, "negative_prompt")
    check_seed(args.seed, args.n)
    files = output_files(args.output, args.prompt, args.seed, args.n)
    pipe = _load_pipeline(args)
    _writable(files[0].parent)
    with _step_bar(args.quiet or args.json) as on_step:
        result = pipe(
            args.prompt,
            args.negative,
            num_images=args.n,
            seed=args.seed,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            width=args.width,
            height=args.height,
            on_step=on_step,
        )
    from diffusionfm.images import save_png

    settings = _settings(args, pipe)
    for file, image, seed in zip(files, result.images, result.seeds, strict=True):
        save_png(image, file, None if args.no_metadata else {**settings, "seed": seed})
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    seconds = time.monotonic() - start
    if args.json:
        images = [{"file": str(file), "seed": seed} for file, seed in zip(files, result.seeds, strict=True)]
        print(
            json.dumps(
                {"images": images, **settings, "warnings": result.warnings, "seconds": round(seconds, 2)}
            )
        )
    else:
        for file, seed in zip(files, result.seeds, strict=True):
            print(f"{file}  (seed {seed})")
    return 0


def output_files(output: str | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Where the pictures go: a .png, numbered -1, -2, ... when there are several; or a folder.

    In a folder, and without an output, files are named after prompt and seed. ValueError for another suffix.
    """
    target = Path(output) if output else Path()
    if output is None or output.endswith("/") or target.is_dir():
        words = re.sub(r"[^a-z0-9]+", "-", prompt[:200].lower()).strip("-")[:40].strip("-") or "picture"
        files = [target / f"{words}-{seed + k}.png" for k in range(count)]
    elif target.suffix.lower() != ".png":
        raise ValueError(
            f"the output must be a .png file or a folder, got {output!r}: pictures keep their alpha as PNG"
        )
    elif count == 1:
        files = [target]
    else:
        files = [target.with_name(f"{target.stem}-{k}{target.suffix}") for k in range(1, count + 1)]
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: choose another output")
    return files


def _writable(folder: Path) -> None:
    """Make the folder, and find out now, not after the work, that it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: choose another output")


def _settings(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    chosen = {key: getattr(args, key) for key in ("steps", "guidance", "width", "height")}
    settings = {key: pipe.defaults[key] if value is None else value for key, value in chosen.items()}
    settings |= {"prompt": args.prompt, "negative_prompt": args.negative, "model": pipe.model_name}
    if args.lora:
        settings["lora"] = [f"{name}:{scale:g}" for name, scale in pipe.loras.items()]
    return {**settings, "version": __version__}


def _load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline that --model, --device, --dtype and --lora ask for, checked before torch is imported."""
    from diffusionfm.lora import parse_lora

    check_settings(
        steps=args.steps, guidance=args.guidance, height=args.height, width=args.width, num_images=args.n
    )
    check_model(args.model)
    loras = [parse_lora(text) for text in args.lora]
    gc.disable()  # a third of the start-up is collections over the thousands of modules that stay anyway
    from diffusionfm.pipeline import DiffusionFMPipeline, pick_device

    gc.freeze()
    gc.enable()
    pipe = DiffusionFMPipeline.from_pretrained(args.model, dtype=args.dtype, device=pick_device(args.device))
    for folder, scale in loras:
        pipe.load_lora(folder, scale)
    return pipe


class _step_bar:
    """A progress bar over network steps on a terminal, nothing elsewhere."""

    def __init__(self, off: bool):
        self.off = off

    def __enter__(self) -> Callable[..., None]:
        from tqdm import tqdm

        self.bar = tqdm(unit="step", leave=False, disable=True if self.off else None)
        return self.step

    def step(self, step: int, total: int, preview: Any) -> None:
        self.bar.total = total
        self.bar.update(step - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class _ItemBar:
    """progress(done, total) as a bar on a terminal, nothing elsewhere."""

    def __init__(self, unit: str):
        from tqdm import tqdm

        self.bar = tqdm(unit=f" {unit}", disable=None)

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)


# ------------------------------------------------------------------ the other commands


def batch(args: argparse.Namespace) -> int:
    """`diffusionfm batch`."""
    from diffusionfm.rows import read_rows

    check_settings(num_images=args.batch_size)
    check_seed(args.seed, args.n)
    check_prompt(args.negative, "negative_prompt")
    rows = read_rows(args.rows)
    pipe = _load_pipeline(args)
    from diffusionfm.batch import generate_batch

    summary = generate_batch(
        rows,
        pipe,
        args.out,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        negative_prompt=args.negative,
        width=args.width,
        height=args.height,
        repeats=args.n,
        batch_size=args.batch_size,
        metadata=not args.no_metadata,
        retry_failed=args.retry_failed,
        progress=not (args.quiet or args.json),
    )
    if args.json:
        print(json.dumps({"out": str(args.out), **vars(summary)}))
    else:
        print(
            f"{summary.made} made, {summary.skipped} already there, {summary.failed} failed, "
            f"{summary.seconds:.1f} s: {args.out / 'manifest.jsonl'}"
        )
    return 1 if summary.failed else 0


def finetune(args: argparse.Namespace) -> int:
    """`diffusionfm finetune`."""
    if not args.data.exists():
        raise ValueError(f"no such folder: {args.data}")
    check_model(args.model)
    chosen = {name: getattr(args, name) for name in ("steps", "rank", "lr", "captions")}
    for name in ("steps", "rank", "lr"):
        if chosen[name] is not None and not chosen[name] > 0:
            raise ValueError(f"{name} must be above 0, got {chosen[name]}")
    from diffusionfm.finetune import finetune as run

    run(
        args.data,
        args.out,
        model=args.model,
        seed=args.seed,
        say=_silent if args.quiet else print,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    print(f'{args.out}: use it with  diffusionfm generate "..." --lora {args.out}')
    return 0


def _silent(text: str) -> None:
    """Say nothing."""


def demo(args: argparse.Namespace) -> int:
    """`diffusionfm demo`: the studio, from the wheel's diffusionfm.demo or the checkout's demo folder."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"a port is from 0 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the studio needs gradio: pip install 'diffusionfm[demo]'")
    if importlib.util.find_spec("diffusionfm.demo") is not None:
        app = importlib.import_module("diffusionfm.demo.app")
    else:
        checkout = Path(__file__).resolve().parent.parent
        if not (checkout / "demo" / "app.py").is_file():
            raise ValueError("the studio's files are missing: install the package again")
        sys.path.insert(0, str(checkout))
        app = importlib.import_module("demo.app")
    app.main(args.port)
    return 0


def shards_build(args: argparse.Namespace) -> int:
    """`diffusionfm shards build`."""
    if not args.config.is_file():
        raise ValueError(f"no such config: {args.config} (the corpus is configs/data/icons.yaml)")
    from diffusionfm.data.icons import build

    report = build(args.config, args.out, progress=_ItemBar("picture"))
    print(f"{report.samples:,} samples of {report.pictures:,} pictures: {args.out}")
    return 0


def shards_pack(args: argparse.Namespace) -> int:
    """`diffusionfm shards pack`."""
    if not args.folder.is_dir():
        raise ValueError(f"no such folder: {args.folder}")
    from diffusionfm.data.folder import pack_folder

    print(
        pack_folder(
            args.folder,
            args.out,
            size=args.size,
            captions=args.captions,
            overwrite=args.overwrite,
            progress=_ItemBar("picture"),
        )
    )
    return 0


def shards_inspect(args: argparse.Namespace) -> int:
    """`diffusionfm shards inspect`."""
    from diffusionfm.data.report import inspect_shards

    sheet = args.sheet or args.dir / "contact_sheet.png"
    report = inspect_shards(args.dir, sheet, progress=_ItemBar("picture"))
    if args.json:
        print(json.dumps({**report, "sheet": str(sheet)}))
        return 0
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for word, count in value.items():
                print(f"  {count:>9,}  {word}")
        else:
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    print(f"contact sheet: {sheet}")
    return 0


def shards_verify(args: argparse.Namespace) -> int:
    """`diffusionfm shards verify`: every problem on a line, exit code 1 when there is one."""
    from diffusionfm.data.report import verify_shards

    problems = verify_shards(args.dir, progress=_ItemBar("shard"))
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "all shards are whole", file=sys.stderr)
    return 1 if problems else 0


def shards_attribution(args: argparse.Namespace) -> int:
    """`diffusionfm shards attribution`: to standard output, or a file."""
    from diffusionfm.data.report import attribution

    text = attribution(args.dir)
    if args.output is None:
        sys.stdout.write(text)
        return 0
    from diffusionfm.images import write_atomic

    write_atomic(args.output, text.encode())
    return 0


# ------------------------------------------------------------------ arguments

CAPTIONS = ("refuse", "name", "skip")
_CAPTIONS_HELP = "a picture without one: refuse the folder (default), use the words of its name, or skip it"


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="diffusionfm",
        description="Text to transparent pictures: draw, fine-tune, batch, serve.",
        epilog='examples:\n  diffusionfm generate "a red apple" -o apple.png --seed 7\n'
        "  diffusionfm batch prompts.jsonl --out pictures\n  diffusionfm demo",
    )
    parser.add_argument("--version", action="version", version=f"diffusionfm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_batch(commands)
    _add_finetune(commands)
    _add_demo(commands)
    _add_shards(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], summary: str, *examples: str) -> Parser:
    lines = "\n".join(f"  diffusionfm {example}" for example in examples)
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"examples:\n{lines}"
    )
    command.set_defaults(run=run)
    return command


def _add_generate(commands: Any) -> None:
    command = _command(
        commands,
        "generate",
        generate,
        "draw pictures of a prompt",
        'generate "a red apple" -o apple.png --seed 7',
        'generate "a smiling cat, sticker" --n 4 -o cat.png        # cat-1.png to cat-4.png, seeds 0 to 3',
        'generate "a house" --lora my-style:0.8 --json',
    )
    command.add_argument("prompt", help="what to draw")
    command.add_argument(
        "-o",
        "--output",
        help="a .png file (with --n: NAME-1.png, NAME-2.png, ...) or a folder; default: from the prompt",
    )
    command.add_argument("--seed", type=int, default=0, help="picture k of --n uses seed + k (default 0)")
    command.add_argument("--n", type=int, default=1, help="how many pictures, 1 to 1000 (default 1)")
    _add_settings(command)


def _add_settings(command: Parser) -> None:
    command.add_argument("--steps", type=int, help="network steps, 1 to 500 (default: the model's)")
    command.add_argument(
        "--guidance", type=float, help="how closely to follow the prompt, 0 to 50 (default: the model's)"
    )
    command.add_argument("--negative", default="", metavar="PROMPT", help="what to keep away from")
    command.add_argument(
        "--width", type=int, help="pixels, 32 to 1024, a multiple of 16 (default: the model's)"
    )
    command.add_argument("--height", type=int, help="as --width")
    command.add_argument("--model", metavar="DIR", help="a pipeline folder (default: the shipped model)")
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="add a LoRA; may be given several times",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
        help="of the denoiser; auto is bfloat16 on a GPU that has it, else float32",
    )
    command.add_argument(
        "--no-metadata", action="store_true", help="leave prompt and settings out of the PNG"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_batch(commands: Any) -> None:
    command = _command(
        commands,
        "batch",
        batch,
        "draw a picture for every row of a file; the same command again goes on where it stopped",
        "batch prompts.jsonl --out pictures",
        "batch prompts.csv --out pictures --seed 3 --steps 20 --batch-size 16",
        "batch prompts.txt --out pictures --retry-failed",
    )
    command.add_argument(
        "rows",
        type=Path,
        help=".txt with a prompt a line, or .jsonl, .csv, .tsv (prompt and, if wanted, id, negative_prompt, "
        "seed, steps, guidance, width, height)",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets the pictures and manifest.jsonl"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="run seed, for rows without their own (default 0)"
    )
    command.add_argument("--n", type=int, default=1, help="pictures a row (default 1)")
    command.add_argument("--batch-size", type=int, default=8, help="pictures in a network call (default 8)")
    command.add_argument("--retry-failed", action="store_true", help="also try again what failed before")
    _add_settings(command)


def _add_finetune(commands: Any) -> None:
    command = _command(
        commands,
        "finetune",
        finetune,
        "adapt the model to a folder of pictures and captions; the same command again goes on where it stopped",
        "finetune my-pictures --out my-style",
        "finetune my-pictures --out my-style --steps 300 --rank 16 --captions name",
    )
    command.add_argument(
        "data", type=Path, help="pictures with .txt beside them, metadata.jsonl or a CSV; or shards"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets the LoRA; --lora DIR uses it"
    )
    command.add_argument(
        "--model", metavar="DIR", help="the model to start from (default: the shipped model)"
    )
    command.add_argument("--steps", type=int, help="training steps (default 300)")
    command.add_argument("--rank", type=int, help="LoRA rank (default 16)")
    command.add_argument("--lr", type=float, help="learning rate (default 0.001)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--captions", choices=CAPTIONS, help=_CAPTIONS_HELP)
    command.add_argument("--quiet", action="store_true", help="no report on the pictures")


def _add_demo(commands: Any) -> None:
    command = _command(commands, "demo", demo, "open the studio in a browser", "demo", "demo --port 7861")
    command.add_argument("--port", type=int, default=7860, help="on 127.0.0.1 (default 7860)")


def _add_shards(commands: Any) -> None:
    shards = commands.add_parser(
        "shards",
        help="make and check training shards",
        description="Make and check training shards (WebDataset tars, img2dataset layout).",
        epilog="examples:\n  diffusionfm shards build configs/data/icons.yaml --out shards/icons\n"
        "  diffusionfm shards verify shards/icons",
    )
    kinds = shards.add_subparsers(metavar="COMMAND", required=True)
    command = _command(
        kinds,
        "build",
        shards_build,
        "fetch and render the open-icons corpus",
        "shards build configs/data/icons.yaml --out shards/icons",
    )
    command.add_argument("config", type=Path, help="configs/data/icons.yaml")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command = _command(
        kinds,
        "pack",
        shards_pack,
        "pack your own pictures and captions",
        "shards pack my-pictures --out shards/mine",
    )
    command.add_argument("folder", type=Path, help="pictures with .txt beside them, metadata.jsonl or a CSV")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    command.add_argument("--captions", choices=CAPTIONS, default="refuse", help=_CAPTIONS_HELP)
    command.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    for name, run, summary in (
        ("inspect", shards_inspect, "count by source and licence, and draw a contact sheet"),
        ("verify", shards_verify, "check every hash and name what is broken"),
        ("attribution", shards_attribution, "write ATTRIBUTION.md from the shards"),
    ):
        command = _command(kinds, name, run, summary, f"shards {name} shards/icons")
        command.add_argument("dir", type=Path, help="a folder of shards")
        if name == "inspect":
            command.add_argument("--sheet", type=Path, metavar="PNG", help="default: DIR/contact_sheet.png")
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if name == "attribution":
            command.add_argument("-o", "--output", type=Path, help="default: standard output")


if __name__ == "__main__":
    sys.exit(main())
