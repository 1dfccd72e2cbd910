"""Teach an autoencoder larger pictures: python train/upscaler.py configs/icons/upscaler.yaml trainer.output_dir=RUN"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusionfm.autoencoder import AutoencoderKL, Upscaler, shrunk
from diffusionfm.checkpoint import write_json
from diffusionfm.config import check_options, parse_args, user_errors
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import DataConfig, fixed_samples, picture_batches, pixels
from diffusionfm.encoders import load_vae
from diffusionfm.images import contact_sheet
from diffusionfm.needs import make_missing, require
from diffusionfm.trainer import Trainer, TrainerConfig
from diffusionfm.upscaling import Upscaling, lanczos, upscaling_report


@dataclass
class UpscalerConfig:
    """Keys of an upscaler run. `objective` goes to Upscaling(**objective)."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needs: dict[str, str] = field(default_factory=dict)
    vae: str = (
        "diffusionfm/weights/icons/vae"  # a trained autoencoder: its encoder and decoder stay as they are
    )
    widths: list[int] = field(default_factory=lambda: [28, 20])  # see autoencoder.Upscaler
    objective: dict = field(default_factory=dict)
    validation_pictures: int = 128  # held-out pictures judged every trainer.validate_every steps


def main(argv: list[str] | None = None) -> Path:
    """Train the upscaler, judge it beside Lanczos on held-out pictures; returns the run folder."""
    cfg = parse_args(
        UpscalerConfig,
        argv,
        __doc__,
        "python train/upscaler.py configs/icons/upscaler.yaml trainer.steps=500",
    )
    with user_errors():
        make_missing(cfg.needs)
        require(vae=cfg.vae)
        check_options("objective", cfg.objective, Upscaling)
        torch.manual_seed(cfg.trainer.seed)
        vae = with_upscaler(load_vae(cfg.vae), cfg.widths)
        data = picture_batches(cfg.data, cfg.trainer.batch_size, cfg.trainer.seed)
        held_out = ShardDataset(cfg.data.shards, split="heldout")
        judged = [
            (s["meta"].get("source", ""), pixels(s))
            for s in fixed_samples(held_out, cfg.validation_pictures, cfg.data.buckets)
        ]
        run = Path(cfg.trainer.output_dir)

        def validate(step: int, networks: dict) -> dict[str, float]:
            reports = {scale: upscaling_report(vae, judged, scale) for scale in vae.scales[1:]}
            write_json(run / "report.json", {"step": step, **reports})
            largest = reports[Upscaler.factor]["all"]
            return {f"heldout_{name}": value for name, value in largest.items() if name != "pictures"}

        def on_sample(step: int, networks: dict) -> None:
            shown = torch.stack([picture for _, picture in judged[:8]]).float() / 255
            latent = vae.encode(shrunk(shown, Upscaler.factor).to(vae.device))
            rows = [lanczos(vae.decode(latent)).cpu(), vae.decode(latent, Upscaler.factor).cpu(), shown]
            contact_sheet(to_pil(torch.stack(rows, 1).flatten(0, 1)), columns=3).save(
                run / "samples" / f"{step:07d}.png"
            )

        Trainer(
            cfg.trainer,
            Upscaling(vae, **cfg.objective),
            data,
            resolved_config=cfg,
            on_sample=on_sample,
            validate=validate,
        ).fit()
    return run


def with_upscaler(vae: AutoencoderKL, widths: list[int]) -> AutoencoderKL:
    """The same autoencoder with a new upscaler, unless it has one of these widths. ValueError for one without alpha."""
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"an upscaler belongs to an autoencoder that train/vae.py made, not to {type(vae).__name__}"
        )
    if list(vae.config.upscaler_widths or ()) == list(widths):
        return vae
    larger = AutoencoderKL(**{**vae.config, "upscaler_widths": list(widths)})
    known = {name: value for name, value in vae.state_dict().items() if not name.startswith("upscaler.")}
    larger.load_state_dict(
        known | {k: v for k, v in larger.state_dict().items() if k.startswith("upscaler.")}
    )
    return larger


def to_pil(pictures: torch.Tensor) -> list:
    """Float RGBA (n, 4, y, x) in [0, 1] as PIL pictures."""
    from PIL import Image

    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a, "RGBA") for a in arrays]


if __name__ == "__main__":
    main()
