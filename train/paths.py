"""Store the guided model's ways from noise to picture: python train/paths.py configs/icons/paths.yaml"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from diffusionfm.checkpoint import weights_hash
from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.training import DataConfig, caption_batches
from diffusionfm.devices import has_fast_bf16, parse_dtype, pick_device
from diffusionfm.distill import teacher_path
from diffusionfm.images import write_atomic
from diffusionfm.pipeline import DiffusionFMPipeline


@dataclass
class PathsConfig:
    """Keys of a run. `data` is what the model was trained on, pictures or latents: its captions are the prompts.

    model: pipeline folder, null for the shipped one. count: paths to make. strides: how many parts of each are kept;
    a student may join several. steps, guidance: how the teacher draws. dtype: of the network; auto is bfloat16 where
    the processor has it, else float32.
    """

    output_dir: str = "runs/icons/paths"
    model: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    count: int = 8192
    batch_size: int = 64
    strides: int = 4
    steps: int = 20
    guidance: float = 4.0
    seed: int = 1_000_000
    dtype: str = "auto"
    device: str = "auto"


def main(argv: list[str] | None = None) -> Path:
    """Write a file of paths a batch; started again it goes on. Under torchrun each rank makes every n-th file."""
    cfg = parse_args(PathsConfig, argv, __doc__, "python train/paths.py configs/icons/paths.yaml")
    with user_errors():
        out = Path(cfg.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        pipe = DiffusionFMPipeline.from_pretrained(cfg.model, device=pick_device(cfg.device))
        model = weights_hash(pipe.transformer)
        fast = torch.bfloat16 if has_fast_bf16(pipe.device) else torch.float32
        pipe.transformer.to(parse_dtype(cfg.dtype) or fast)
        batches = caption_batches(cfg.data, cfg.batch_size, cfg.seed)
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for k in tqdm(range(rank, -(-cfg.count // cfg.batch_size), ranks), unit="file", disable=rank > 0):
            file = out / f"{k:05d}.safetensors"
            if file.exists():
                continue
            prompts = batches.batch(k)["caption"]
            seeds = range(cfg.seed + k * cfg.batch_size, cfg.seed + (k + 1) * cfg.batch_size)
            cuts = teacher_path(pipe, prompts, seeds, cfg.strides, cfg.steps, cfg.guidance)
            told = {"model": model, "captions": "\n".join(prompts)}
            write_atomic(file, save({"cuts": cuts.half().contiguous()}, metadata=told))
    return out


if __name__ == "__main__":
    main()
