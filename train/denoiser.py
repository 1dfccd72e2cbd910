"""Pretrain the denoiser on latent shards: python train/denoiser.py configs/icons/denoiser.yaml trainer.steps=N"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusionfm.checkpoint import weights_hash
from diffusionfm.config import check_options, parse_args, user_errors
from diffusionfm.data.order import Batches
from diffusionfm.data.training import (
    DataConfig,
    collate_latents,
    fixed_samples,
    latent_batches,
    latent_dataset,
)
from diffusionfm.drawing import plan_tasks
from diffusionfm.encoders import load_text, load_vae
from diffusionfm.images import contact_sheet, in_common, save_png
from diffusionfm.needs import make_missing, require
from diffusionfm.objectives import FlowMatching
from diffusionfm.pipeline import DiffusionFMPipeline, build_pipeline
from diffusionfm.precompute.encoder import text_hash
from diffusionfm.trainer import Trainer, TrainerConfig
from diffusionfm.transformer import DiffusionTransformer
from diffusionfm.unet import DiffusionUNet

DENOISERS = {"transformer": DiffusionTransformer, "unet": DiffusionUNet}
PROMPTS = (  # noqa: SIM905, prompts read best as one line
    "red heart, smiling face, cat, dog, tree, house, car, apple, sun, star, fish, flower, "
    "rocket, pizza, guitar, crown, umbrella, ghost, robot, dragon"
).split(", ")


@dataclass
class SampleConfig:
    """How the sample grids are drawn, and what the saved pipeline takes as its defaults."""

    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    steps: int = 20
    guidance: float = 4.0
    shift: float = 1.0


@dataclass
class DenoiserConfig:
    """Keys of a denoiser run. `denoiser` goes to the network, `objective` to FlowMatching(**objective)."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needs: dict[str, str] = field(default_factory=dict)
    kind: str = "transformer"  # or unet
    denoiser: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    checkpointing: bool = False  # keep what enters each block, compute the rest again in the backward pass
    vae: str = "runs/icons/vae/vae"
    text_encoder: str = "runs/icons/text_encoder/text_encoder"
    tokenizer: str = "runs/icons/tokenizer/tokenizer"
    sample: SampleConfig = field(default_factory=SampleConfig)
    validation_latents: int = 512


def main(argv: list[str] | None = None) -> Path:
    """Train, draw grids and measure the held-out loss on the way, save RUN/pipeline/; returns the run folder."""
    cfg = parse_args(DenoiserConfig, argv, __doc__, "python train/denoiser.py configs/icons/denoiser.yaml")
    with user_errors():
        if cfg.kind not in DENOISERS:
            raise ValueError(f"kind must be one of {', '.join(DENOISERS)}, got {cfg.kind!r}")
        check_options("denoiser", cfg.denoiser, DENOISERS[cfg.kind])
        check_options("objective", cfg.objective, FlowMatching)
        make_missing(cfg.needs)
        require(vae=cfg.vae, text_encoder=cfg.text_encoder, tokenizer=cfg.tokenizer)
        torch.manual_seed(cfg.trainer.seed)
        vae = load_vae(cfg.vae)
        text_encoder, tokenizer = load_text(cfg.text_encoder, cfg.tokenizer)
        made_by = {"vae_hash": weights_hash(vae), "text_hash": text_hash(text_encoder, tokenizer)}
        unseen = latent_dataset(cfg.data.shards, split="heldout", **made_by)
        held_out = collate_latents(fixed_samples(unseen, cfg.validation_latents, cfg.data.buckets))
        data = latent_batches(
            cfg.data,
            batch_size=cfg.trainer.batch_size,
            seed=cfg.trainer.seed,
            text_multiple=cfg.objective.get("text_multiple", 32),
            **made_by,
        )
        denoiser = build_denoiser(cfg, vae.latent_channels, text_encoder.config.hidden_size)
        check_shapes(data, getattr(denoiser, "patch", 1), vae.downsample)
        objective = FlowMatching(denoiser, text_encoder, tokenizer, **cfg.objective)
        height, width = (side * vae.downsample for side in held_out["latent"].shape[-2:])
        defaults = {key: getattr(cfg.sample, key) for key in ("steps", "guidance", "shift")}
        defaults |= {"height": height, "width": width}
        pipe = build_pipeline(vae, text_encoder, tokenizer, denoiser, defaults)
        pipe.settings()  # what cannot be drawn is told now, not when the first grid is due
        plan_tasks(cfg.sample.prompts, None, 0, 1)
        run = Path(cfg.trainer.output_dir)

        def on_sample(step: int, networks: dict) -> None:
            with in_precision():
                draw_grid(pipe, cfg.sample.prompts, run / "samples" / f"{step:07d}.png")

        def in_precision() -> torch.autocast:
            """That of training: some attention kernels know bf16 alone."""
            return torch.autocast(pipe.device.type, torch.bfloat16, enabled=trainer.bf16)

        def validate(step: int, networks: dict) -> dict[str, float]:
            with in_precision():
                return {"heldout_loss": objective.validation_loss(held_out["latent"], held_out["caption"])}

        trainer = Trainer(
            cfg.trainer, objective, data, resolved_config=cfg, on_sample=on_sample, validate=validate
        )
        vae.to(trainer.device)
        trainer.fit()
        if trainer.accelerator.is_main_process:
            averaged = type(denoiser).from_pretrained(
                run / "transformer", use_safetensors=True, local_files_only=True
            )
            if objective.tune_text:
                text_encoder, _ = load_text(run / "text_encoder", cfg.tokenizer)
            pipe = build_pipeline(vae, text_encoder, tokenizer, averaged, defaults)
            pipe.to(torch.float16)  # half the bytes; loads as float32 or bfloat16
            pipe.save_pretrained(run / "pipeline")
    return run


def check_shapes(data: Batches, patch: int, downsample: int) -> None:
    """ValueError for buckets of latents that do not cut into the denoiser's patches: told before a step meets one."""
    for rows, columns in (bucket.shape for bucket in getattr(data, "buckets", [])):
        if rows % patch or columns % patch:
            raise ValueError(
                f"the latents of {columns * downsample}x{rows * downsample} pixels, {columns}x{rows}, do not cut into "
                f"patches of {patch}: precompute pictures whose sides are multiples of {patch * downsample}"
            )


def build_denoiser(cfg: DenoiserConfig, in_channels: int, text_dim: int) -> Any:
    """The network of a config, for latents and text features of these widths; ValueError where it names others."""
    for key, size, folder in (
        ("in_channels", in_channels, cfg.vae),
        ("text_dim", text_dim, cfg.text_encoder),
    ):
        if cfg.denoiser.get(key, size) != size:
            raise ValueError(
                f"denoiser.{key}={cfg.denoiser[key]}, but {folder} gives {size}: set it to that, or name another folder"
            )
    denoiser = DENOISERS[cfg.kind](**{"in_channels": in_channels, "text_dim": text_dim, **cfg.denoiser})
    if cfg.checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def draw_grid(pipe: DiffusionFMPipeline, prompts: list[str], file: Path) -> None:
    """Write a labelled sheet, the first seed of each prompt over a checkerboard, which tells how it was made."""
    drawn = pipe(prompts, seed=0)
    sheet = contact_sheet(drawn.images, labels=prompts, columns=min(len(prompts), 10))
    save_png(sheet, file, in_common(drawn.told))


if __name__ == "__main__":
    main()
