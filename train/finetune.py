"""Adapt a model to your pictures: python train/finetune.py configs/finetune/laptop.yaml data=my-pictures"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusionfm.config import parse_args, user_errors
from diffusionfm.finetune import FinetuneConfig, run, scale_preset_lr


def main(argv: list[str] | None = None) -> Path:
    """Train as `diffusionfm finetune` does, every key within reach; returns the run folder.

    With method=full a preset's learning rate becomes a tenth, unless trainer.lr=... stands on the command line."""
    example = "python train/finetune.py configs/finetune/laptop.yaml data=my-pictures"
    cfg = parse_args(FinetuneConfig, argv, __doc__, example)
    if not any(word.startswith("trainer.lr=") for word in (sys.argv[1:] if argv is None else argv)):
        scale_preset_lr(cfg)
    with user_errors():
        return run(cfg)


if __name__ == "__main__":
    main()
