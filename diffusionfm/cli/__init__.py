"""The `diffusionfm` command. Arguments are checked before anything heavy is imported.

Exit codes: 0 done, 1 some pictures of a batch failed, shards are damaged or a scorecard is unsound, 2 a mistake in the
call (one line `error: ...` says how to mend it), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffusionfm import __version__
from diffusionfm.cli import batch, draw, evaluate, serve, shards, training
from diffusionfm.cli.draw import output_files
from diffusionfm.cli.parts import Parser

__all__ = ["build_parser", "main", "output_files"]


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
    draw.add_generate(commands)
    batch.add_batch(commands)
    training.add_finetune(commands)
    training.add_export(commands)
    training.add_plan(commands)
    evaluate.add_evaluate(commands)
    draw.add_demo(commands)
    serve.add_serve(commands)
    shards.add_shards(commands)
    return parser
