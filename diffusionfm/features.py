"""Precomputed text: the features of all captions of a picture in one file, one of them picked for training.

Axes: b batch, l tokens, d width, n tokens of all captions of a picture, k captions of a picture.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

EMPTY_PROMPT = "empty_prompt.safetensors"  # beside the shards: what the text encoder gives for no words


def join_captions(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Features (l, d) of each of k captions, without padding, as {"text": (n, d), "text_ends": int32 (k,)}.

    Caption i is text[ends[i - 1] : ends[i]].
    """
    lengths = torch.tensor([len(caption) for caption in features])
    return {"text": torch.cat(list(features)), "text_ends": lengths.cumsum(0).to(torch.int32)}


def caption_features(stored: Mapping[str, Tensor], i: int) -> Tensor:
    """The features (l, d) of caption i of what `join_captions` made."""
    ends = stored["text_ends"].tolist()
    return stored["text"][ends[i - 1] if i else 0 : ends[i]]


def pad_captions(features: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Features (l_i, d) of b captions -> (text (b, l, d), mask (b, l)), zero and False beyond each caption's end.

    l is the longest caption's length rounded up to a multiple of `multiple`, so that a compiled denoiser meets few
    shapes.
    """
    lengths = torch.tensor([len(caption) for caption in features])
    length = -(-int(lengths.max()) // multiple) * multiple
    text = features[0].new_zeros(len(features), length, features[0].shape[-1])
    for row, caption in zip(text, features, strict=True):
        row[: len(caption)] = caption
    return text, torch.arange(length) < lengths[:, None]


def chosen_text(
    stored: Sequence[Mapping[str, Tensor]],
    captions: Sequence[Sequence[str]],
    chosen: Sequence[str],
    multiple: int = 32,
) -> dict[str, Tensor]:
    """What a batch of latents takes along: {"text": (b, l, d), "mask": (b, l)} of the caption chosen of each sample.

    stored: the tensors of each sample. captions: all its captions, in the order of their features. l is a multiple
    of `multiple`. Gives {} where samples were stored without text features.
    """
    if "text" not in stored[0]:
        return {}
    picked = [
        caption_features(tensors, list(all_of_it).index(one))
        for tensors, all_of_it, one in zip(stored, captions, chosen, strict=True)
    ]
    text, mask = pad_captions(picked, multiple)
    return {"text": text, "mask": mask}


def drop_prompts(text: Tensor, mask: Tensor, kept: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Text (b, l, d), float32, and mask (b, l) with the empty prompt's features (m, d) where kept (b,) is False."""
    more = max(0, len(empty) - text.shape[1])
    text, mask = F.pad(text.float(), (0, 0, 0, more)), F.pad(mask, (0, more))
    blank = F.pad(empty.to(text), (0, 0, 0, text.shape[1] - len(empty)))
    blank_mask = torch.arange(text.shape[1], device=mask.device) < len(empty)
    kept = kept.to(text.device)
    return torch.where(kept[:, None, None], text, blank), torch.where(kept[:, None], mask, blank_mask)


def empty_prompt(shards: str | os.PathLike) -> Tensor | None:
    """Features (l, d) of the empty prompt that lie beside precomputed shards; None where no text was precomputed."""
    file = Path(shards) / EMPTY_PROMPT
    return load_file(file)["text"] if file.is_file() else None


def refuse_stale(
    shards: str | os.PathLike, meta: Mapping[str, Any], vae: str | None, text: str | None = None
) -> None:
    """ValueError, with the command that mends it, when other networks made precomputed shards.

    meta: that of any sample there. vae, text: this run's hashes, as `precompute` takes them; shards without text
    features fit any text encoder, and a run that needs no latents of its own network, vae None, fits any.
    """
    made_by = meta.get("vae"), meta.get("text")
    wrong = "autoencoder" if vae not in (None, made_by[0]) else ""
    if made_by[1] not in (None, text):
        wrong = wrong or "text encoder or tokenizer"
    if wrong:
        was, now = (made_by[0], vae) if wrong == "autoencoder" else (made_by[1], text)
        config = Path(shards).parent / "config.yaml"
        raise ValueError(
            f"{shards} was made by another {wrong} ({was}, not {now}): run python train/precompute.py "
            f"{config if config.is_file() else 'CONFIG.yaml'} overwrite=true"
        )
