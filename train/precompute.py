"""Encode picture shards to latents and text features: python train/precompute.py configs/icons/precompute.yaml"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusionfm.config import dump_config, parse_args, user_errors
from diffusionfm.needs import make_missing, require
from diffusionfm.precompute.corpus import precompute
from diffusionfm.precompute.encoder import EncoderConfig


@dataclass
class OutputConfig:
    """Where to write, how many pictures a network call, and at most how many pictures (steps; 0: all)."""

    output_dir: str = "runs/latents"
    batch_size: int = 64
    steps: int = 0


@dataclass
class PrecomputeConfig:
    """Keys of a precompute run; text_encoder and tokenizer, given together, store text features too.

    engine: local (also under torchrun and accelerate launch: each rank takes its shards) or ray, with `workers` tasks
    at a time (0: as many as there are cores or GPUs). overwrite: replace what other networks or pictures made.
    """

    trainer: OutputConfig = field(default_factory=OutputConfig)
    needs: dict[str, str] = field(default_factory=dict)
    shards: str = "data/icons"
    vae: str = "runs/icons/vae/vae"
    text_encoder: str | None = None
    tokenizer: str | None = None
    dtype: str = "float16"  # or bfloat16
    engine: str = "local"
    workers: int = 0
    overwrite: bool = False


def main(argv: list[str] | None = None) -> Path:
    """Write RUN/latents/ and RUN/config.yaml; started again it goes on. Returns the run folder."""
    cfg = parse_args(
        PrecomputeConfig, argv, __doc__, "python train/precompute.py configs/icons/precompute.yaml"
    )
    with user_errors():
        make_missing(cfg.needs)
        networks = {"vae": cfg.vae, "text_encoder": cfg.text_encoder, "tokenizer": cfg.tokenizer}
        require(**{key: path for key, path in networks.items() if path})
        run = precompute(
            cfg.shards,
            cfg.trainer.output_dir,
            EncoderConfig(
                cfg.vae, cfg.text_encoder, cfg.tokenizer, dtype=cfg.dtype, batch_size=cfg.trainer.batch_size
            ),
            limit=cfg.trainer.steps,
            engine=cfg.engine,
            workers=cfg.workers,
            overwrite=cfg.overwrite,
        )
        if os.environ.get("RANK", "0") == "0":
            dump_config(replace(cfg, overwrite=False), run / "config.yaml")
    return run


if __name__ == "__main__":
    main()
