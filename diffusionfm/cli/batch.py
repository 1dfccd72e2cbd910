"""The command that draws a file of prompts: batch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_model
from diffusionfm.cli.draw import add_settings, load_pipeline, writable
from diffusionfm.cli.parts import add_command

CHOSEN = [
    "seed",
    "steps",
    "guidance",
    "width",
    "height",
    "only",
    "wildcards_folder",
    "batch_size",
    "deterministic",
]
CHOSEN += ["to", "samples_per_shard", "background", "size", "sheets", "retry_failed", "engine", "workers"]
"""Options that are named as their flags are."""


def batch(args: argparse.Namespace) -> int:
    """`diffusionfm batch`."""
    from diffusionfm.batch.options import Options
    from diffusionfm.batch.rows import Rows
    from diffusionfm.batch.stores import open_store

    chosen = {name: getattr(args, name) for name in CHOSEN}
    options = Options(
        **chosen,
        format=args.format or "png",
        negative_prompt=args.negative,
        repeats=args.n,
        metadata=not args.no_metadata,
    )
    open_store(options.to, args.out, options.finish.suffix, options.samples_per_shard)
    rows = Rows(args.rows, options.wildcards)
    check_model(args.model)
    if not args.dry_run:
        writable(args.out)
    start = time.monotonic()
    pipe = load_pipeline(args)
    load_seconds = time.monotonic() - start
    from diffusionfm.batch import generate_batch, plan_batch

    drawn = options.settings(pipe)
    for warning in options.finish.advice((drawn["width"], drawn["height"])):
        print(f"warning: {warning}, where a row names no size of its own", file=sys.stderr)
    if args.dry_run:
        plan = plan_batch(rows, pipe, args.out, options)
        print(json.dumps(plan.report()) if args.json else plan.text())
        return 0
    bar = not (args.quiet or args.json)
    summary = generate_batch(rows, pipe, args.out, options, load_seconds=load_seconds, progress=bar)
    if args.json:
        print(json.dumps({"out": str(args.out), **summary.report()}))
    else:
        print(f"{summary.text()}\n{args.out / 'manifest.jsonl'}")
    return 1 if summary.failed else 0


def add_batch(commands: Any) -> None:
    command = add_command(
        commands,
        "batch",
        batch,
        "draw a picture for every row of a file; the same command again goes on where it stopped",
        "batch prompts.jsonl --out pictures",
        "batch prompts.csv --out pictures --seed 3 --steps 20 --batch-size 16 --dry-run",
        "batch prompts.txt --out pictures --retry-failed",
        "batch animals.txt --out pictures --wildcards words --n 10       # {red|blue} __animals__",
        "batch prompts.parquet --out shards --to webdataset --format webp",
        "batch - --out icons --format svg < prompts.txt",
    )
    command.add_argument(
        "rows",
        help=".txt with a prompt per line (and --w --h --s --l --d --n for width, height, steps, guidance, seed, "
        "negative), or .jsonl, .csv, .tsv, .parquet with prompt and, if wanted, id, negative_prompt, seed, steps, "
        "guidance, width, height; - for JSON or plain lines on standard input",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets pictures, manifest.jsonl and report.json"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="run seed, for rows without their own (default 0)"
    )
    command.add_argument("--n", type=int, default=1, help="pictures per row (default 1)")
    command.add_argument(
        "--only", action="append", default=[], metavar="ID", help="this row alone; may be repeated"
    )
    command.add_argument(
        "--wildcards",
        dest="wildcards_folder",
        metavar="DIR",
        help="its NAME.txt files are the choices for __NAME__ in prompts, one picked per picture; {__NAME__}: all",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print the plan and an estimate, write nothing"
    )
    command.add_argument(
        "--batch-size", type=int, help="pictures in a network call (default: what memory takes)"
    )
    command.add_argument(
        "--deterministic",
        action="store_true",
        help="one picture per network call: its bytes then do not depend on the rest of the batch",
    )
    command.add_argument("--retry-failed", action="store_true", help="also try again what failed before")
    command.add_argument(
        "--to",
        default="folder",
        choices=["folder", "webdataset", "parquet"],
        help="one file per picture (default), WebDataset shards, or Parquet with the pictures inside",
    )
    command.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="of --to webdataset and parquet (1000)",
    )
    command.add_argument(
        "--sheets", type=int, default=1, help="how many contact sheets of 100 pictures at most (default 1)"
    )
    command.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="where to draw: in this process or on a Ray cluster (default local)",
    )
    command.add_argument(
        "--workers", type=int, default=0, help="of --engine ray (default: one per GPU, or else one per core)"
    )
    add_settings(command)
