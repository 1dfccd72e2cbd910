"""Adapt a model to your pictures: python train/finetune.py configs/finetune/laptop.yaml data=my-pictures"""

from __future__ import annotations

from pathlib import Path

from diffusionfm.config import parse_args, user_errors
from diffusionfm.finetune import FinetuneConfig, run


def main(argv: list[str] | None = None) -> Path:
    """Train as `diffusionfm finetune` does, every key within reach; returns the run folder."""
    example = "python train/finetune.py configs/finetune/laptop.yaml data=my-pictures"
    cfg = parse_args(FinetuneConfig, argv, __doc__, example)
    with user_errors():
        return run(cfg)


if __name__ == "__main__":
    main()
