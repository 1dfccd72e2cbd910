"""Shards as training batches: collation, the choice among a picture's captions, and the mixture of sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from diffusionfm.data.buckets import BucketBatches, BucketConfig, choose_shapes, commonest, crop_box, fit
from diffusionfm.data.order import Batches
from diffusionfm.data.reader import ShardDataset, told_captions
from diffusionfm.features import chosen_text, refuse_stale

STYLED_SHARE = 0.3  # how often the fullest caption is read; the others share the rest evenly
COMMON_SOURCES = 8  # a phrase that so many sources draw keeps its weight whatever `common` is


@dataclass
class DataConfig:
    """Which shards to read, and how often each source and each thing comes.

    shards: a folder of shards.
    weights: source name -> how often its samples come an epoch (1 when not named, `default` sets another).
    common: exponent that favours what many sources draw: a sample's weight is multiplied by (sources that draw its
        phrase / 8) ** common. 0 leaves weights as they are; 1 makes a thing drawn twice as often come twice as often.
    styled: source name -> how often its fullest caption, the one that names the style, is read (0.3 when not named,
        `default` sets another). A prompt without a style then means the sources with a low share.
    buckets: how to train on pictures of many shapes, see BucketConfig; without it all are of one size.
    workers: threads that read ahead.
    """

    shards: str = "data/icons"
    weights: dict[str, float] = field(default_factory=dict)
    common: float = 0.0
    styled: dict[str, float] = field(default_factory=dict)
    buckets: BucketConfig | None = None
    workers: int = 1


def choose_caption(captions: Sequence[str], draw: int, styled: float = STYLED_SHARE) -> str:
    """One of a picture's captions, from 64 random bits: the first for a `styled` share, else any of the others."""
    if len(captions) == 1 or draw % 1000 < styled * 1000:
        return captions[0]
    return captions[1 + (draw // 1000) % (len(captions) - 1)]


def captions_of(sample: dict[str, Any]) -> list[str]:
    """All captions of a sample, the fullest first: those that its JSON lists, or else its .txt."""
    return told_captions(sample["meta"]) or [sample["caption"]]


def choose_captions(samples: list[dict[str, Any]], styled: dict[str, float]) -> list[str]:
    """A caption of each sample, drawn by its `draw` bits; `styled` is that of DataConfig."""
    default = styled.get("default", STYLED_SHARE)
    return [
        choose_caption(captions_of(s), s.get("draw", 0), styled.get(s["meta"].get("source", ""), default))
        for s in samples
    ]


def pixels(sample: dict[str, Any]) -> torch.Tensor:
    """A sample's picture as uint8 (4, y, x), straight alpha; cut to its `shape` where a bucket gave it one."""
    return stack_pixels([sample])[0]


def stack_pixels(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The pictures of samples, each cut to its `shape` if it has one, as uint8 (b, 4, y, x).

    `ValueError` when they differ in size."""
    pictures = [fit(s["picture"], s["shape"]) if "shape" in s else s["picture"] for s in samples]
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise ValueError(
            f"pictures differ in size ({', '.join(f'{x}x{y}' for x, y in sorted(sizes))}): pack them at one size, "
            "or give data.buckets"
        )
    width, height = pictures[0].size
    stacked = np.empty((len(pictures), 4, height, width), dtype=np.uint8)
    for row, picture in zip(stacked, pictures, strict=True):
        row[:] = np.asarray(picture).transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def collate_pictures(samples: list[dict[str, Any]], styled: dict[str, float] | None = None) -> dict[str, Any]:
    """Samples -> key, picture uint8 (b, 4, y, x), caption (one chosen for each) and phrase.

    Samples of a bucket also give `crop`, float32 (b, 4): left, top, right and bottom of what is seen of each picture,
    in pixels of the picture as stored."""
    batch = {
        "key": [s["key"] for s in samples],
        "picture": stack_pixels(samples),
        "phrase": [s["meta"].get("phrase") or s["caption"] for s in samples],
        "caption": choose_captions(samples, styled or {}),
    }
    if "shape" in samples[0]:
        batch["crop"] = torch.tensor([crop_box(s["picture"].size, s["shape"]) for s in samples])
    return batch


def sample_weights(dataset: ShardDataset, cfg: DataConfig) -> np.ndarray | None:
    """One weight per sample, (n,), by its source and phrase, or None when all are equal.

    `ValueError` for a source that nobody has, a share that is none and weights that cannot be drawn by."""
    if not cfg.weights and not cfg.styled and not cfg.common:
        return None
    told = dataset.columns("source", "phrase")
    sources, phrases = [source or "" for source, _ in told], [phrase or "" for _, phrase in told]
    for name, table in {"weights": cfg.weights, "styled": cfg.styled}.items():
        if unknown := set(table) - set(sources) - {"default"}:
            raise ValueError(
                f"data.{name} names {', '.join(sorted(unknown))}; "
                f"these shards hold {', '.join(sorted(set(sources)))}"
            )
    if bad := [name for name, share in cfg.styled.items() if not 0 <= share <= 1]:
        raise ValueError(f"data.styled.{bad[0]} is a share, from 0 to 1, not {cfg.styled[bad[0]]}")
    if not cfg.weights and not cfg.common:
        return None
    drawn_by: dict[str, set[str]] = defaultdict(set)
    for source, phrase in zip(sources, phrases, strict=True):
        drawn_by[phrase].add(source)
    default = cfg.weights.get("default", 1.0)
    by_source = np.array([cfg.weights.get(source, default) for source in sources])
    times_drawn = np.array([len(drawn_by[phrase]) for phrase in phrases])
    return by_source * (times_drawn / COMMON_SOURCES) ** cfg.common


def picture_batches(cfg: DataConfig, batch_size: int, seed: int) -> Batches:
    """Endless training batches of pictures and captions; the trainer splits them by rank.

    `ValueError` for shards that are cut short or missing, and for settings that do not fit them."""
    dataset = ShardDataset(cfg.shards, split="train")
    return _batches(dataset, partial(collate_pictures, styled=cfg.styled), cfg, batch_size, seed)


def caption_batches(cfg: DataConfig, batch_size: int, seed: int) -> Batches:
    """Endless batches of {"key", "caption"} alone, of shards of pictures or of latents: the prompts of a mixture."""
    dataset = ShardDataset(cfg.shards, split="train", needs=("txt",))
    collate = partial(collate_captions, styled=cfg.styled)
    return _batches(dataset, collate, replace(cfg, buckets=None), batch_size, seed)


def collate_captions(samples: list[dict[str, Any]], styled: dict[str, float] | None = None) -> dict[str, Any]:
    """Samples -> key and caption, one chosen for each."""
    return {"key": [s["key"] for s in samples], "caption": choose_captions(samples, styled or {})}


def _batches(dataset: ShardDataset, collate: Any, cfg: DataConfig, batch_size: int, seed: int) -> Batches:
    if dataset.faults:
        raise ValueError(
            f"{cfg.shards}: {'; '.join(dataset.faults[:3])}. Copy or build what is cut short again, or remove the "
            ".tar with its .parquet and _stats.json to train without it"
        )
    weights = sample_weights(dataset, cfg)
    if cfg.buckets is None:
        return Batches(dataset, collate, batch_size, seed, weights=weights, workers=cfg.workers)
    shapes = shapes_of(dataset, cfg.buckets, batch_size, weights)
    return BucketBatches(dataset, collate, shapes, cfg.buckets, batch_size, seed, weights, cfg.workers)


def shapes_of(
    dataset: ShardDataset, cfg: BucketConfig, batch_size: int = 1, weights: np.ndarray | None = None
) -> np.ndarray:
    """Rows and columns, int64 (n, 2), at which each sample is trained on: its bucket's, or its latent's as stored."""
    if "safetensors" in dataset.needs:
        return np.array([dataset.tensor_shape(i, "latent")[-2:] for i in range(len(dataset))])
    return choose_shapes(dataset.sizes(), cfg, batch_size, weights)


def fixed_samples(
    dataset: ShardDataset, count: int, buckets: BucketConfig | None = None
) -> list[dict[str, Any]]:
    """`count` samples spread evenly over a dataset: the same ones each time, for validation and sample grids.

    With `buckets` all are of the commonest shape, so that they stack."""
    if count < 1:
        raise ValueError(f"{count} samples to judge by; ask for 1 or more")
    if buckets is None:
        count = min(count, len(dataset))
        return [dataset[k * len(dataset) // count] for k in range(count)]
    shapes = shapes_of(dataset, buckets)
    alike = commonest(shapes).tolist()
    count = min(count, len(alike))
    chosen = [alike[k * len(alike) // count] for k in range(count)]
    return [{**dataset[i], "shape": tuple(shapes[i].tolist())} for i in chosen]


def all_captions(shards: str) -> list[str]:
    """Every caption of the training samples, each once, in order of first appearance."""
    dataset = ShardDataset(shards, split="train")
    found: dict[str, None] = {}
    for i in range(len(dataset)):
        found.update(dict.fromkeys(told_captions(dataset.meta(i)) or [dataset.caption(i)]))
    return list(found)


def held_out_phrases(dataset: ShardDataset) -> set[str]:
    """The phrases of a held-out dataset: words that no training text may be."""
    return {dataset.meta(i).get("phrase", "") for i in range(len(dataset))}


# ---- precomputed latents -----------------------------------------------------------------------------------------


def collate_latents(
    samples: list[dict[str, Any]], styled: dict[str, float] | None = None, text_multiple: int = 32
) -> dict[str, Any]:
    """Precomputed samples -> key, latent 16-bit (b, c, y, x), caption; and text, mask where text was precomputed.

    text (b, l, d) and mask (b, l) are the features of the captions chosen, l a multiple of text_multiple. `ValueError`
    for latents of many shapes."""
    stored = [load(s["safetensors"]) for s in samples]
    if len(shapes := {tuple(tensors["latent"].shape) for tensors in stored}) > 1:
        raise ValueError(
            f"latents differ in shape ({', '.join(map(str, sorted(shapes)))}): give data.buckets"
        )
    chosen = choose_captions(samples, styled or {})
    return {
        "key": [s["key"] for s in samples],
        "latent": torch.stack([tensors["latent"] for tensors in stored]),
        "caption": chosen,
        **chosen_text(stored, [captions_of(s) for s in samples], chosen, text_multiple),
    }


def latent_dataset(
    shards: str, vae_hash: str | None, split: str, text_hash: str | None = None
) -> ShardDataset:
    """Precomputed latents of one split. `ValueError` when other networks made them; vae_hash None takes any.

    text_hash: that of the text encoder and tokenizer; text features stored with the latents must be theirs."""
    dataset = ShardDataset(shards, split=split, needs=("safetensors", "txt"))
    refuse_stale(shards, dataset.meta(0), vae_hash, text_hash)
    return dataset


def latent_batches(
    cfg: DataConfig,
    vae_hash: str | None,
    batch_size: int,
    seed: int,
    text_hash: str | None = None,
    text_multiple: int = 32,
) -> Batches:
    """Endless training batches of latents and captions; the trainer splits them by rank. Errors as picture_batches."""
    dataset = latent_dataset(cfg.shards, vae_hash, "train", text_hash)
    collate = partial(collate_latents, styled=cfg.styled, text_multiple=text_multiple)
    return _batches(dataset, collate, cfg, batch_size, seed)
