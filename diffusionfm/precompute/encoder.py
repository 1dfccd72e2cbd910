"""Frozen networks that turn pictures and captions into what is stored of them.

Axes: b batch, c channels, y x rows and columns, l tokens, d width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffusionfm.checkpoint import weights_hash
from diffusionfm.data.training import captions_of, stack_pixels
from diffusionfm.devices import has_fast_bf16, rank_device
from diffusionfm.encoders import load_text, load_vae
from diffusionfm.features import join_captions
from diffusionfm.text import encode_prompts

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EncoderConfig:
    """Which networks encode, and how.

    vae: a folder. text_encoder, tokenizer: folders, both or neither; without them no text is encoded.
    dtype: float16 or bfloat16, of what is stored. batch_size: pictures a network call, and captions.
    device: auto takes this process's GPU where there is one.
    """

    vae: str
    text_encoder: str | None = None
    tokenizer: str | None = None
    dtype: str = "float16"
    batch_size: int = 64
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if bool(self.text_encoder) != bool(self.tokenizer):
            raise ValueError("text_encoder and tokenizer belong together: give both, or neither")


class Encoder:
    """Frozen networks that turn samples into what is stored; `made_by` tells them from others."""

    def __init__(self, cfg: EncoderConfig) -> None:
        self.cfg, self.dtype = cfg, DTYPES[cfg.dtype]
        self.device = rank_device(cfg.device)
        self.vae = load_vae(cfg.vae).to(self.device)
        self.made_by = {"vae": weights_hash(self.vae), "text": None, "dtype": cfg.dtype}
        if cfg.text_encoder:
            self.text_encoder, self.tokenizer = load_text(cfg.text_encoder, cfg.tokenizer)
            self.text_encoder.to(self.device)  # type: ignore[arg-type]
            self.made_by["text"] = text_hash(self.text_encoder, self.tokenizer)

    @torch.no_grad()
    def __call__(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The tensors of each sample, on the CPU: "latent" (c, y, x), and "text" and "text_ends" of `join_captions`."""
        tensors = [{"latent": latent} for latent in self.latents(samples)]
        if self.cfg.text_encoder:
            captions = [captions_of(s) for s in samples]
            features = iter(self.texts([caption for of in captions for caption in of]))
            for stored, of in zip(tensors, captions, strict=True):
                stored |= join_captions([next(features) for _ in of])
        return tensors

    @torch.no_grad()
    def latents(self, samples: list[dict[str, Any]]) -> list[Tensor]:
        """The normalised latent (c, y, x) of each sample; pictures of equal size are encoded together."""
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(s["picture"].size for s in samples):
            rows = [i for i, s in enumerate(samples) if s["picture"].size == size]
            pictures = stack_pixels([samples[i] for i in rows]).to(self.device).float() / 255
            with torch.autocast(self.device.type, torch.bfloat16, enabled=has_fast_bf16(self.device)):
                latents = self.vae.encode(pictures)
            found |= dict(zip(rows, self._stored(latents), strict=True))
        return [found[i] for i in range(len(samples))]

    @torch.no_grad()
    def texts(self, captions: list[str]) -> list[Tensor]:
        """The features (l, d) of each caption, without padding; captions of like length are encoded together."""
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self.cfg.batch_size):
            rows = order[start : start + self.cfg.batch_size]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                text, mask, _ = encode_prompts(self.tokenizer, self.text_encoder, [captions[i] for i in rows])
            found |= {
                i: self._stored(features[keep]) for i, features, keep in zip(rows, text, mask, strict=True)
            }
        return [found[i] for i in range(len(captions))]

    def _stored(self, x: Tensor) -> Tensor:
        small = x.to(self.dtype).cpu().contiguous()
        if not torch.isfinite(small).all():
            raise ValueError(
                f"these networks give numbers that {self.cfg.dtype} cannot hold: take dtype=bfloat16"
            )
        return small


@lru_cache(1)
def load_encoder(cfg: EncoderConfig) -> Encoder:
    """The encoder of a config, loaded once a process."""
    return Encoder(cfg)


def text_hash(text_encoder: torch.nn.Module, tokenizer: Any) -> str:
    """12 hex digits that tell a text encoder and its tokenizer from others."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # as the last call left them
        rules.pop(state, None)
    words = json.dumps([weights_hash(text_encoder), rules, tokenizer.model_max_length], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:12]
