"""Shards as training batches: collation, the choice among a picture's captions, and the mixture of sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from diffusionfm.data.order import Batches
from diffusionfm.data.reader import ShardDataset

STYLED_SHARE = 0.3  # how often the fullest caption is read; the others share the rest evenly


@dataclass
class DataConfig:
    """Which shards to read, and how often each source comes.

    shards: a folder of shards. weights: source name -> how often its samples come an epoch (1 when not named,
    `default` sets another). workers: threads that read ahead.
    """

    shards: str = "data/icons"
    weights: dict[str, float] = field(default_factory=dict)
    workers: int = 1


def choose_caption(captions: Sequence[str], draw: int) -> str:
    """One of a picture's captions, from 64 random bits: the first for 30 %, else any of the others."""
    if len(captions) == 1 or draw % 1000 < STYLED_SHARE * 1000:
        return captions[0]
    return captions[1 + (draw // 1000) % (len(captions) - 1)]


def pixels(sample: dict[str, Any]) -> torch.Tensor:
    """A sample's picture as uint8 (4, y, x), straight alpha."""
    return torch.from_numpy(np.array(sample["picture"])).permute(2, 0, 1)


def stack_pixels(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The pictures of samples as uint8 (b, 4, y, x). `ValueError` when they differ in size."""
    sizes = {s["picture"].size for s in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"pictures differ in size ({', '.join(f'{x}x{y}' for x, y in sorted(sizes))}): pack them at one size"
        )
    return torch.stack([pixels(s) for s in samples])


def collate_pictures(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> key, picture uint8 (b, 4, y, x), caption (one chosen for each) and phrase."""
    return {
        "key": [s["key"] for s in samples],
        "picture": stack_pixels(samples),
        "phrase": [s["meta"].get("phrase") or s["caption"] for s in samples],
        "caption": [
            choose_caption(s["meta"].get("captions") or [s["caption"]], s.get("draw", 0)) for s in samples
        ],
    }


def source_weights(dataset: ShardDataset, weights: dict[str, float]) -> np.ndarray | None:
    """One weight a sample by its source, or None when all are equal; `ValueError` for a source nobody has."""
    if not weights:
        return None
    sources = [dataset.meta(i).get("source", "") for i in range(len(dataset))]
    unknown = set(weights) - set(sources) - {"default"}
    if unknown:
        raise ValueError(
            f"data.weights names {', '.join(sorted(unknown))}; these shards hold {', '.join(sorted(set(sources)))}"
        )
    default = weights.get("default", 1.0)
    return np.array([weights.get(source, default) for source in sources])


def picture_batches(cfg: DataConfig, batch_size: int, seed: int) -> Batches:
    """Endless training batches of pictures and captions; the trainer splits them by rank."""
    dataset = ShardDataset(cfg.shards, split="train")
    weights = source_weights(dataset, cfg.weights)
    return Batches(dataset, collate_pictures, batch_size, seed, weights=weights, workers=cfg.workers)


def fixed_samples(dataset: ShardDataset, count: int) -> list[dict[str, Any]]:
    """`count` samples spread evenly over a dataset: the same ones each time, for validation and sample grids."""
    if count < 1:
        raise ValueError(f"{count} samples to judge by; ask for 1 or more")
    count = min(count, len(dataset))
    return [dataset[k * len(dataset) // count] for k in range(count)]


def all_captions(shards: str) -> list[str]:
    """Every caption of the training samples, each once, in order of first appearance."""
    dataset = ShardDataset(shards, split="train")
    found: dict[str, None] = {}
    for i in range(len(dataset)):
        found.update(dict.fromkeys(dataset.meta(i).get("captions") or [dataset.caption(i)]))
    return list(found)


def held_out_phrases(dataset: ShardDataset) -> set[str]:
    """The phrases of a held-out dataset: words that no training text may be."""
    return {dataset.meta(i).get("phrase", "") for i in range(len(dataset))}


# ---- precomputed latents -----------------------------------------------------------------------------------------


def collate_latents(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Precomputed samples -> {"key": [...], "latent": float16 (b, c, y, x), "caption": [...]}."""
    return {
        "key": [s["key"] for s in samples],
        "latent": torch.stack([load(s["safetensors"])["latent"] for s in samples]),
        "caption": [
            choose_caption(s["meta"].get("captions") or [s["caption"]], s.get("draw", 0)) for s in samples
        ],
    }


def latent_dataset(shards: str, vae_hash: str, split: str) -> ShardDataset:
    """Precomputed latents of one split. `ValueError` when another autoencoder made them."""
    dataset = ShardDataset(shards, split=split, needs=("safetensors", "txt"))
    made_by = dataset.meta(0).get("vae")
    if made_by != vae_hash:
        raise ValueError(
            f"{shards} was made by another autoencoder ({made_by}, not {vae_hash}): run train/precompute.py again"
        )
    return dataset


def latent_batches(cfg: DataConfig, vae_hash: str, batch_size: int, seed: int) -> Batches:
    """Endless training batches of latents and captions; the trainer splits them by rank."""
    dataset = latent_dataset(cfg.shards, vae_hash, "train")
    weights = source_weights(dataset, cfg.weights)
    return Batches(dataset, collate_latents, batch_size, seed, weights=weights, workers=cfg.workers)
