"""The commands that draw a prompt: generate and demo; and what batch shares with them."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_model, check_prompt, check_seed, check_settings
from diffusionfm.cli.parts import (
    Parser,
    StepBar,
    add_command,
    add_model_options,
    add_models,
    add_safety,
    load_loras,
    models_of,
    safety_of,
)
from diffusionfm.edit import default_strength
from diffusionfm.formats import FORMATS, Finish, pick_format
from diffusionfm.images import write_atomic
from diffusionfm.inputs import open_picture
from diffusionfm.lora import parse_lora


def generate(args: argparse.Namespace) -> int:
    """`diffusionfm generate`."""
    start = time.monotonic()
    if args.prompt or args.image is None:
        check_prompt(args.prompt)
    check_prompt(args.negative, "negative_prompt")
    check_settings(num_images=args.n)
    check_seed(args.seed, args.n)
    _check_start(args)
    finish = Finish(pick_format(args.output, args.format), args.background, args.size)
    files = output_files(args.output, args.prompt, args.seed, args.n, finish.suffix)
    pipe = load_pipeline(args, draws_only=True)
    if args.size is not None and args.width is None and args.height is None:
        args.width, args.height = pipe.size_for(args.size)
    writable(files[0].parent)
    with StepBar(args.quiet or args.json) as on_step:
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
            image=args.image,
            mask_image=args.mask,
            strength=args.strength,
        )
    for file, image, told in zip(files, result.images, result.told, strict=True):
        write_atomic(file, finish.encode(image, None if args.no_metadata else told))
    result.warnings += finish.advice(result.images[0].size)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    seconds = time.monotonic() - start
    if args.json:
        images = [{"file": str(file), "seed": seed} for file, seed in zip(files, result.seeds, strict=True)]
        print(
            json.dumps(
                {
                    "images": images,
                    **result.told[0],
                    "warnings": result.warnings,
                    "seconds": round(seconds, 2),
                }
            )
        )
    else:
        for file, seed in zip(files, result.seeds, strict=True):
            print(f"{file}  (seed {seed})")
    return 0


def _check_start(args: argparse.Namespace) -> None:
    """Open --image and --mask and fill in --strength, so that bad ones are told before a model is loaded."""
    if args.image is None:
        if args.mask is not None or args.strength is not None:
            raise ValueError("--mask and --strength need a picture to set out from: give --image FILE")
        return
    check_settings(strength=args.strength)
    if args.strength is None:
        args.strength = default_strength(args.mask is not None)
    args.image = open_picture(args.image, "the picture of --image")
    if args.mask is not None:
        args.mask = open_picture(args.mask, "the mask")


def output_files(output: str | None, prompt: str, seed: int, count: int, suffix: str = ".png") -> list[Path]:
    """Where the pictures go: a file of that suffix, numbered -1, -2, ... when there are several; or a folder.

    In a folder, and without an output, files are named after prompt and seed. ValueError for another suffix.
    """
    target = Path(output) if output else Path()
    if output is None or output.endswith("/") or target.is_dir():
        words = re.sub(r"[^a-z0-9]+", "-", prompt[:200].lower()).strip("-")[:40].strip("-") or "picture"
        files = [target / f"{words}-{seed + k}{suffix}" for k in range(count)]
    elif target.suffix.lower() != suffix:
        raise ValueError(
            f"the output must be a .png, .webp or .svg file, which keep alpha, or a folder ({output}/ makes it), "
            f"got {output!r}"
        )
    elif count == 1:
        files = [target]
    else:
        files = [target.with_name(f"{target.stem}-{k}{target.suffix}") for k in range(1, count + 1)]
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: choose another output")
    return files


def writable(folder: Path) -> None:
    """Make the folder, and find out now, not after the work, that it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): choose another output") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: choose another output")


def load_pipeline(args: argparse.Namespace, draws_only: bool = False) -> Any:
    """The pipeline that --model, --fast, --device, --dtype and --lora ask for, checked before torch is imported.

    draws_only: a `Painter` will do, which starts in a third of the time."""
    check_settings(
        steps=args.steps, guidance=args.guidance, height=args.height, width=args.width, num_images=args.n
    )
    check_model(args.model)
    loras = [parse_lora(text) for text in args.lora]
    with _uncollected():
        from diffusionfm.devices import pick_device

        if draws_only and not loras:
            from diffusionfm.light import open_painter as load
        else:
            from diffusionfm.pipeline import DiffusionFMPipeline

            load = DiffusionFMPipeline.from_pretrained
    pipe: Any = load(args.model, dtype=args.dtype, device=pick_device(args.device), fast=args.fast)
    if loras:
        load_loras(pipe, loras, args.lora_any)
    return pipe


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without collecting garbage: a third of a start-up goes over thousands of modules that stay anyway."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def demo(args: argparse.Namespace) -> int:
    """`diffusionfm demo`: the studio, from the wheel's diffusionfm.demo or the checkout's demo folder."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"a port is from 0 to 65535, got {args.port}")
    check_model(args.model)
    loras = [parse_lora(text) for text in args.lora]
    from diffusionfm.serve.access import Access, read_logins

    access = Access(host=args.host, logins=read_logins(args.login_file), shared=args.share)
    safety = safety_of(args)
    if importlib.util.find_spec("diffusionfm.demo") is not None:
        app = importlib.import_module("diffusionfm.demo.app")
    else:
        checkout = Path(__file__).resolve().parents[2]
        if not (checkout / "demo" / "app.py").is_file():
            raise ValueError("the studio's files are missing: install the package again")
        sys.path.insert(0, str(checkout))
        app = importlib.import_module("demo.app")
    from diffusionfm.serve import logs

    logs.to_stderr()
    app.main(
        args.port,
        args.model,
        args.device,
        models=models_of(args),
        access=access,
        safety=safety,
        dtype=args.dtype,
        fast=args.fast,
        loras=loras,
        lora_any=args.lora_any,
        runs=args.runs,
        metadata=not args.no_metadata,
        log_prompts=args.log_prompts,
    )
    return 0


def add_generate(commands: Any) -> None:
    command = add_command(
        commands,
        "generate",
        generate,
        "draw pictures of a prompt",
        'generate "a red apple" -o apple.png --seed 7',
        'generate "a smiling cat, sticker" --n 4 -o cat.png        # cat-1.png to cat-4.png, seeds 0 to 3',
        'generate "a rocket icon" -o rocket.svg',
        'generate "a green apple" --image apple.png --strength 0.6',
        'generate "a house" --lora my-style:0.8 --background "sky blue" --size 512 --json',
    )
    command.add_argument("prompt", help="what to draw")
    command.add_argument(
        "-o",
        "--output",
        help="a .png, .webp or .svg file (with --n: NAME-1.png, NAME-2.png, ...) or a folder; "
        "default: from the prompt",
    )
    command.add_argument("--seed", type=int, default=0, help="picture k of --n uses seed + k (default 0)")
    command.add_argument("--n", type=int, default=1, help="how many pictures, 1 to 1000 (default 1)")
    command.add_argument(
        "--image",
        metavar="FILE",
        help='a picture to set out from, fitted to the size; the prompt may then be ""',
    )
    command.add_argument(
        "--strength",
        type=float,
        help="how far to leave --image, 0.01 to 1 "
        f"(default {default_strength(False)}; {default_strength(True)} with --mask)",
    )
    command.add_argument(
        "--mask",
        metavar="FILE",
        help="as large as --image: white where to draw anew; elsewhere not a bit of the fitted picture changes",
    )
    add_settings(command)


def add_settings(command: Parser) -> None:
    """What `generate` and `batch` have in common."""
    command.add_argument("--steps", type=int, help="network steps, 1 to 500 (default: the model's)")
    command.add_argument(
        "--guidance", type=float, help="how closely to follow the prompt, 0 to 50 (default: the model's)"
    )
    command.add_argument("--negative", default="", metavar="PROMPT", help="what to keep away from")
    command.add_argument(
        "--width", type=int, help="pixels to draw, of a size that the model has (default: the model's own)"
    )
    command.add_argument("--height", type=int, help="as --width")
    add_model_options(command, lora="add a LoRA; may be given several times")
    command.add_argument("--format", choices=FORMATS, help="default: as the output is named, else png")
    command.add_argument(
        "--background",
        metavar="COLOUR",
        help="lay pictures on it: a colour word or #rrggbb (default: transparent)",
    )
    command.add_argument(
        "--size",
        type=int,
        help="pixels on the longer side, 16 to 4096: drawn at the largest size the model has up to that, then enlarged",
    )
    command.add_argument(
        "--no-metadata", action="store_true", help="leave prompt and settings out of the files"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def add_demo(commands: Any) -> None:
    command = add_command(
        commands,
        "demo",
        demo,
        "open the studio in a browser",
        "demo",
        "demo --port 7861 --lora my-style",
        "demo --models my-models",
        "demo --host 0.0.0.0 --login-file logins.txt",
    )
    command.add_argument("--port", type=int, default=7860, help="default 7860")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1, this machine alone; any other demands a login)",
    )
    command.add_argument(
        "--share", action="store_true", help="a public link through Gradio's tunnel; demands a login"
    )
    command.add_argument(
        "--login-file",
        type=Path,
        metavar="FILE",
        help="name:password lines, readable by you alone: who may come in, to the page and to the API beside it",
    )
    command.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/studio"),
        metavar="DIR",
        help="where it keeps what people fine-tune and draw in batches (default runs/studio)",
    )
    add_model_options(command, lora="offer a LoRA to everyone; may be given several times")
    add_models(command)
    add_safety(command)
    command.add_argument(
        "--no-metadata",
        action="store_true",
        help="leave prompt and settings out of the pictures that the page hands out",
    )
    command.add_argument(
        "--log-prompts", action="store_true", help="write the API's prompts into the log as well"
    )
