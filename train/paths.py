"""Store the guided model's ways from noise to picture: python train/paths.py configs/icons/paths.yaml"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.training import DataConfig, caption_batches
from diffusionfm.devices import has_fast_bf16, parse_dtype, rank_device
from diffusionfm.distill import read_paths, teacher_strides
from diffusionfm.images import write_atomic
from diffusionfm.lora import merge_few_step
from diffusionfm.pipeline import DiffusionFMPipeline


@dataclass
class PathsConfig:
    """Keys of a run. `data` is what the model was trained on, pictures or latents: its captions are the prompts.

    model: pipeline folder, null for the shipped one. student: a run of train/distill.py, or a pipeline folder with
    few_step in it, whose own ways the teacher answers to; null for the teacher's own. count: paths to make. strides:
    into how many equal parts the teacher's `steps` are cut, the steps of the student. guidance: how the teacher draws,
    null for the model's own. dtype: of the networks; auto is bfloat16 where the processor has it, else float32.
    """

    output_dir: str = "runs/icons/paths"
    model: str | None = None
    student: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    count: int = 8192
    batch_size: int = 64
    strides: int = 3
    steps: int = 18
    guidance: float | None = None
    seed: int = 1_000_000
    dtype: str = "auto"
    device: str = "auto"


def main(argv: list[str] | None = None) -> Path:
    """Write a file of paths a batch; started again it goes on. Under torchrun each rank makes every n-th file."""
    cfg = parse_args(PathsConfig, argv, __doc__, "python train/paths.py configs/icons/paths.yaml")
    with user_errors():
        out = Path(cfg.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        pipe = DiffusionFMPipeline.from_pretrained(cfg.model, device=rank_device(cfg.device), dtype="float32")
        guidance = float(pipe.defaults["guidance"] if cfg.guidance is None else cfg.guidance)
        fast = torch.bfloat16 if has_fast_bf16(pipe.device) else torch.float32
        dtype = parse_dtype(cfg.dtype) or fast
        batches = caption_batches(cfg.data, cfg.batch_size, cfg.seed)
        drawn = {
            **{name: getattr(cfg, name) for name in ("steps", "strides", "seed", "batch_size")},
            **{"guidance": guidance, "shift": pipe.defaults["shift"], "dtype": str(dtype)},
            **{"styled": cfg.data.styled, "data": batches.fingerprint},
        }
        student = None
        if cfg.student:
            student = DiffusionFMPipeline.from_pretrained(cfg.model, device=pipe.device, dtype="float32")
            learned = merge_few_step(
                student.transformer, Path(cfg.student), Path(pipe.config["_name_or_path"])
            )
            now = {"steps": cfg.strides, "shift": pipe.defaults["shift"]}
            if wrong := [f"{name} {learned[name]:g}" for name in now if learned[name] != now[name]]:
                raise ValueError(
                    f"{cfg.student} learned {', '.join(wrong)}, these paths are of {now}: draw with its own"
                )
            drawn["student"] = student.fingerprint()
        told = {"model": pipe.fingerprint(), "drawn": json.dumps(drawn, sort_keys=True)}
        for one in filter(None, (pipe, student)):
            if one.transformer.dtype != dtype:
                one.transformer.to(dtype)
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for k in tqdm(range(rank, -(-cfg.count // cfg.batch_size), ranks), unit="file", disable=rank > 0):
            file = out / f"{k:05d}.safetensors"
            if file.exists():
                refuse_others(file, told)
                continue
            prompts = batches.batch(k)["caption"]
            seeds = range(cfg.seed + k * cfg.batch_size, cfg.seed + (k + 1) * cfg.batch_size)
            ways = teacher_strides(pipe, prompts, seeds, cfg.strides, cfg.steps, guidance, student)
            tensors = {name: way.half() for name, way in zip(("from", "to"), ways, strict=True)}
            write_atomic(file, save(tensors, metadata={**told, "captions": json.dumps(prompts)}))
    return out


def refuse_others(file: Path, told: dict[str, str]) -> None:
    """ValueError where a file of paths was drawn by another model or otherwise than this run draws."""
    _, _, found = read_paths(file)
    if wrong := [name for name, value in told.items() if found[name] != value]:
        what = "by another model" if "model" in wrong else "with other settings"
        raise ValueError(f"{file} was drawn {what}: give another output_dir, or remove that one")


if __name__ == "__main__":
    main()
