"""What commands share: the parser, how a command is added, progress bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

CAPTIONS_HELP = (
    "a picture without one: refuse the folder (default), use the words of its name or of its folder's, the trigger "
    "alone, or skip it"
)


class Parser(argparse.ArgumentParser):
    """Errors are one line; help keeps the examples' line breaks."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, run: Callable[..., int], summary: str, *examples: str) -> Parser:
    lines = "\n".join(f"  diffusionfm {example}" for example in examples)
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"examples:\n{lines}"
    )
    command.set_defaults(run=run)
    return command


def load_loras(pipe: Any, loras: Sequence[tuple[Path, float]], any_model: bool) -> None:
    """Add LoRAs to a pipeline, and say on standard error what is to be known about them."""
    for source, scale in loras:
        word = pipe.load_lora(source, scale, any_model)
        if word:
            print(f"note: {word}", file=sys.stderr)


class StepBar:
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


class ItemBar:
    """progress(done, total) as a bar on a terminal, nothing elsewhere."""

    def __init__(self, unit: str):
        from tqdm import tqdm

        self.bar = tqdm(unit=f" {unit}", disable=None)

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)


def add_safety(command: argparse.ArgumentParser) -> None:
    """--safety and --safety-list: what a server does about prompts that hold a word of a list."""
    command.add_argument(
        "--safety",
        default="flag",
        choices=["flag", "refuse", "off"],
        help="prompts with a word of the list: drawn and flagged, which the studio blurs, or refused (default flag)",
    )
    command.add_argument(
        "--safety-list", type=Path, metavar="FILE", help="a list of your own, a word a line (default: ours)"
    )


def safety_of(args: argparse.Namespace) -> Any:
    """What those two ask for."""
    from diffusionfm.serve.safety import LIST, Safety

    return Safety(args.safety, args.safety_list or LIST)


def add_models(command: argparse.ArgumentParser) -> None:
    """--models: further models that a server offers."""
    command.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        help="a folder of pipeline folders: each may be chosen by its name, beside --model, which is the first choice",
    )


def models_of(args: argparse.Namespace) -> dict[str, Path]:
    """What that offers, by name; says on standard error what is left out, and why."""
    if args.models is None:
        return {}
    from diffusionfm.serve.models import find_models

    found, left_out = find_models(args.models, args.model, args.fast)
    for word in left_out:
        print(f"note: {word}", file=sys.stderr)
    return found


def add_model_options(command: argparse.ArgumentParser, lora: str) -> None:
    """--model, --fast, --lora, --lora-any, --device and --dtype: what draws, and on what; `lora`: help of --lora."""
    command.add_argument("--model", metavar="DIR", help="a pipeline folder (default: the shipped model)")
    command.add_argument(
        "--fast",
        action="store_true",
        help="with the model's few-step adapter: a tenth of the work, no guidance",
    )
    command.add_argument("--lora", action="append", default=[], metavar="DIR[:SCALE]", help=lora)
    command.add_argument(
        "--lora-any", action="store_true", help="take LoRAs that were trained on another model, too"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
        help="of the denoiser; auto is bfloat16 on a GPU that has it, else float32",
    )
