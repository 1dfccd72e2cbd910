"""Train the RGBA autoencoder on picture shards: python train/vae.py configs/icons/vae.yaml trainer.output_dir=RUN"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.checkpoint import write_json
from diffusionfm.config import check_options, parse_args, user_errors
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import DataConfig, collate_pictures, fixed_samples, picture_batches, pixels
from diffusionfm.images import contact_sheet
from diffusionfm.needs import make_missing
from diffusionfm.objectives import Reconstruction, reconstruction_report
from diffusionfm.trainer import Trainer, TrainerConfig


@dataclass
class VAEConfig:
    """Keys of a VAE run. `vae` goes to AutoencoderKL(**vae), `objective` to Reconstruction(**objective)."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needs: dict[str, str] = field(default_factory=dict)
    vae: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    statistics_pictures: int = 2048  # training pictures over which latent mean and deviation are measured
    validation_pictures: int = 512  # held-out pictures judged every trainer.validate_every steps


def main(argv: list[str] | None = None) -> Path:
    """Train, measure latent statistics, judge on held-out pictures; returns the run folder."""
    cfg = parse_args(
        VAEConfig, argv, __doc__, "python train/vae.py configs/icons/vae.yaml trainer.steps=2000"
    )
    with user_errors():
        make_missing(cfg.needs)
        if not cfg.trainer.validate_every:
            raise ValueError(
                "trainer.validate_every=0: latent statistics are measured when validating; give 1 or more"
            )
        torch.manual_seed(cfg.trainer.seed)
        check_options("vae", cfg.vae, AutoencoderKL)
        check_options("objective", cfg.objective, Reconstruction)
        vae = AutoencoderKL(**cfg.vae)
        data = picture_batches(cfg.data, cfg.trainer.batch_size, cfg.trainer.seed)
        held_out = ShardDataset(cfg.data.shards, split="heldout")
        judged = [
            (s["meta"].get("source", ""), pixels(s))
            for s in fixed_samples(held_out, cfg.validation_pictures, cfg.data.buckets)
        ]
        shown = torch.stack([picture for _, picture in judged[:32]]).float() / 255
        run = Path(cfg.trainer.output_dir)
        statistics = collate_pictures(fixed_samples(data.dataset, cfg.statistics_pictures, cfg.data.buckets))[
            "picture"
        ]

        def validate(step: int, networks: dict) -> dict[str, float]:
            set_statistics(vae, statistics)
            report = reconstruction_report(vae, judged)
            write_json(run / "report.json", {"step": step, **report})
            return {f"heldout_{name}": value for name, value in report["all"].items() if name != "pictures"}

        def on_sample(step: int, networks: dict) -> None:
            pairs = torch.stack(
                [shown, vae.decode(vae.encode(shown.to(vae.device))).float().cpu()], 1
            ).flatten(0, 1)
            contact_sheet(to_pil(pairs), columns=16).save(run / "samples" / f"{step:07d}.png")

        Trainer(
            cfg.trainer,
            Reconstruction(vae, **cfg.objective),
            data,
            resolved_config=cfg,
            on_sample=on_sample,
            validate=validate,
        ).fit()
    return run


@torch.no_grad()
def set_statistics(vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 64) -> None:
    """Measure the per-channel mean and standard deviation of raw latents over uint8 pictures (n, 4, y, x)."""
    chunks = pictures.split(batch_size)
    means = torch.cat([vae.encode_moments(chunk.to(vae.device).float() / 255)[0] for chunk in chunks])
    vae.set_latent_statistics(means.mean((0, 2, 3)), means.std((0, 2, 3)))


def to_pil(pictures: torch.Tensor) -> list:
    """Float RGBA (n, 4, y, x) in [0, 1] as PIL pictures."""
    from PIL import Image

    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a, "RGBA") for a in arrays]


if __name__ == "__main__":
    main()
