"""The commands about training shards: build, pack, inspect, verify, attribution."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_settings
from diffusionfm.cli.parts import CAPTIONS_HELP, ItemBar, add_command
from diffusionfm.data.captions import CHOICES


def shards_build(args: argparse.Namespace) -> int:
    """`diffusionfm shards build`."""
    if not args.config.is_file():
        raise ValueError(f"no such config: {args.config} (the corpus is configs/data/icons.yaml)")
    from diffusionfm.data.icons import build

    if args.size is not None:
        check_settings(width=args.size)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is how many drawings to take, 1 or more, got {args.limit}")
    asked = {"size": args.size, "limit": args.limit, "vectors_only": args.vectors or None}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if args.limit is not None:
        changes["compositions"] = None
    report = build(args.config, args.out, progress=ItemBar("picture"), **changes)
    print(f"{report.samples:,} samples of {report.pictures:,} pictures: {args.out}")
    return 0


def shards_pack(args: argparse.Namespace) -> int:
    """`diffusionfm shards pack`."""
    if not args.folder.exists():
        raise ValueError(f"no such folder: {args.folder}")
    from diffusionfm.data.archive import as_folder
    from diffusionfm.data.folder import pack_folder

    with as_folder(args.folder) as folder:
        report = pack_folder(
            folder,
            args.out,
            size=args.size,
            captions=args.captions,
            overwrite=args.overwrite,
            held_out=args.held_out,
            progress=ItemBar("picture"),
        )
    report.folder = str(args.folder)
    print(report)
    return 0


def shards_inspect(args: argparse.Namespace) -> int:
    """`diffusionfm shards inspect`."""
    from diffusionfm.data.report import inspect_shards

    sheet = args.sheet or args.dir / "contact_sheet.png"
    report = inspect_shards(args.dir, sheet, progress=ItemBar("picture"))
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

    problems = verify_shards(args.dir, progress=ItemBar("shard"))
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "all shards are whole", file=sys.stderr)
    return 1 if problems else 0


def shards_attribution(args: argparse.Namespace) -> int:
    """`diffusionfm shards attribution`: to standard output, or a file."""
    from diffusionfm.data.report import attribution

    return _write(attribution(args.dir), args.output)


def shards_words(args: argparse.Namespace) -> int:
    """`diffusionfm shards words`: to standard output, or a file."""
    from diffusionfm.data.report import trained_words

    return _write("\n".join([*trained_words(args.dir), ""]), args.output)


def shards_phrases(args: argparse.Namespace) -> int:
    """`diffusionfm shards phrases`: two files in the model's folder."""
    from diffusionfm.data.report import trained_phrases
    from diffusionfm.images import write_atomic
    from diffusionfm.phrasebook import Phrasebook

    phrases = trained_phrases(args.dir)
    if not phrases:
        raise ValueError(
            f"{args.dir}: no phrase is drawn by three sources or more, so there is nothing to write"
        )
    for name, data in Phrasebook.of(phrases).files().items():
        write_atomic(args.output / name, data)
    print(f"{len(phrases):,} phrases in {args.output}")
    return 0


def _write(text: str, output: Path | None) -> int:
    from diffusionfm.images import write_atomic

    if output is None:
        sys.stdout.write(text)
    else:
        write_atomic(output, text.encode())
    return 0


def add_shards(commands: Any) -> None:
    shards = commands.add_parser(
        "shards",
        help="make and check training shards",
        description="Make and check training shards (WebDataset tars, img2dataset layout).",
        epilog="examples:\n  diffusionfm shards build configs/data/icons.yaml --out data/icons\n"
        "  diffusionfm shards verify data/icons",
    )
    kinds = shards.add_subparsers(metavar="COMMAND", required=True)
    command = add_command(
        kinds,
        "build",
        shards_build,
        "fetch and render the open-icons corpus",
        "shards build configs/data/icons.yaml --out data/icons",
    )
    command.add_argument("config", type=Path, help="configs/data/icons.yaml")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--size", type=int, help="pixels a side (default: the config's)")
    command.add_argument(
        "--limit", type=int, help="only this many drawings of all sources, and no compositions"
    )
    command.add_argument("--vectors", action="store_true", help="leave out drawings that are pixels already")
    command = add_command(
        kinds,
        "pack",
        shards_pack,
        "pack your own pictures and captions",
        "shards pack my-pictures --out data/mine",
    )
    command.add_argument(
        "folder", type=Path, help="pictures with .txt beside them, metadata.jsonl or a CSV; or a .zip of them"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    command.add_argument("--captions", choices=CHOICES, default="refuse", help=CAPTIONS_HELP)
    command.add_argument(
        "--held-out",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="share of the captions held out of training, for evaluation (default 0.02, at least one)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    for name, run, summary in (
        ("inspect", shards_inspect, "count by source and licence, and draw a contact sheet"),
        ("verify", shards_verify, "check every hash and name what is broken"),
        ("attribution", shards_attribution, "write ATTRIBUTION.md from the shards"),
        ("words", shards_words, "write words.txt, the words that a model learns from the shards"),
        ("phrases", shards_phrases, "write the phrases that a model comes to know well: its phrasebook"),
    ):
        command = add_command(
            kinds, name, run, summary, f"shards {name} data/icons" + " -o my-model" * (name == "phrases")
        )
        command.add_argument("dir", type=Path, help="a folder of shards")
        if name == "inspect":
            command.add_argument("--sheet", type=Path, metavar="PNG", help="default: DIR/contact_sheet.png")
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if name in ("attribution", "words"):
            command.add_argument("-o", "--output", type=Path, help="default: standard output")
        if name == "phrases":
            command.add_argument(
                "-o", "--output", type=Path, required=True, metavar="MODEL", help="its folder"
            )
