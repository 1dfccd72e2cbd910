"""Encode picture shards to latent shards once: python train/precompute.py configs/icons/precompute.yaml"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.checkpoint import weights_hash
from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shards import ShardWriter
from diffusionfm.data.training import stack_pixels
from diffusionfm.needs import make_missing, require


@dataclass
class OutputConfig:
    """Where to write, how many pictures a network call, and at most how many pictures (steps; 0: all)."""

    output_dir: str = "runs/latents"
    batch_size: int = 64
    steps: int = 0


@dataclass
class PrecomputeConfig:
    """Keys of a precompute run."""

    trainer: OutputConfig = field(default_factory=OutputConfig)
    needs: dict[str, str] = field(default_factory=dict)
    shards: str = "data/icons"
    vae: str = "runs/icons/vae/vae"


def main(argv: list[str] | None = None) -> Path:
    """Write RUN/latents/, shards of float16 latents with the captions and metadata of their pictures.

    Complete output of the same autoencoder is left as it is; that of another is replaced. Returns the run folder.
    """
    cfg = parse_args(
        PrecomputeConfig, argv, __doc__, "python train/precompute.py configs/icons/precompute.yaml"
    )
    with user_errors():
        make_missing(cfg.needs)
        require(vae=cfg.vae)
        vae = AutoencoderKL.from_pretrained(cfg.vae, use_safetensors=True, local_files_only=True).eval()
        vae.to("cuda" if torch.cuda.is_available() else "cpu")
        made_by = weights_hash(vae)
        dataset = ShardDataset(cfg.shards)
        count = min(cfg.trainer.steps or len(dataset), len(dataset))
        out = Path(cfg.trainer.output_dir) / "latents"
        if is_complete(out, made_by, count):
            print(f"{out} is complete: {count} latents of autoencoder {made_by}")
            return out.parent
        with ShardWriter(out, overwrite=True) as writer, tqdm(total=count, unit="picture") as bar:
            readable = islice(dataset, count)
            while samples := list(islice(readable, cfg.trainer.batch_size)):
                for sample, latent in zip(samples, encode(vae, samples), strict=True):
                    meta = {**sample["meta"], "vae": made_by}
                    writer.write_members(
                        sample["key"], {"safetensors": save({"latent": latent})}, sample["caption"], meta
                    )
                bar.update(len(samples))
    return out.parent


def is_complete(folder: Path, made_by: str, count: int) -> bool:
    """Whether a folder already holds `count` latents of this autoencoder."""
    if not any(folder.glob("*.tar")):
        return False
    done = ShardDataset(folder, needs=("safetensors", "txt"))
    return len(done) == count and done.meta(0).get("vae") == made_by


@torch.no_grad()
def encode(vae: AutoencoderKL, samples: list[dict]) -> torch.Tensor:
    """Normalised latents (b, c, y/8, x/8), float16 on the CPU, of samples of equal picture size."""
    pictures = stack_pixels(samples).to(vae.device).float() / 255
    with torch.autocast(vae.device.type, torch.bfloat16):
        return vae.encode(pictures).half().cpu().contiguous()


if __name__ == "__main__":
    main()
