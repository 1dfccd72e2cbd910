"""The judge's maps, fitted to training pictures and phrases: a small CLIP head on two frozen networks' features.

Axes: n pictures, p phrases, d the shared space's width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionfm.images import write_atomic
from diffusionfm.sentences import SentenceTeacher

WIDTH = 256
BATCH = 1024


def phrase_features(phrases: list[str], cache: Path, chunk: int = 128) -> np.ndarray:
    """The sentence encoder's features (p, 384) of phrases, kept in `cache`."""
    name = hashlib.sha256("\n".join(phrases).encode()).hexdigest()[:16]
    file = cache / f"phrases-{name}.safetensors"
    if not file.exists():
        teacher = SentenceTeacher()
        order = sorted(range(len(phrases)), key=lambda i: len(phrases[i]))  # alike in length: little padding
        features = np.zeros((len(phrases), teacher.width), np.float32)
        for start in range(0, len(order), chunk):
            rows = order[start : start + chunk]
            features[rows] = teacher([phrases[i] for i in rows]).numpy()
        write_atomic(file, save({"features": features}))
    return load_file(file)["features"]


class Maps(nn.Module):
    """Standardised picture features (n, 1280) and phrase features (n, 384) -> one space (n, d)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, width: int = WIDTH, text: int = 384):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.picture = nn.Linear(len(mean), width, bias=False)
        self.text = nn.Linear(text, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def pictures(self, features: Tensor) -> Tensor:
        return F.normalize(self.picture((features - self.mean) / self.std), dim=-1)

    def texts(self, features: Tensor) -> Tensor:
        return F.normalize(self.text(features), dim=-1)


def fit_maps(pictures: np.ndarray, texts: np.ndarray, of: np.ndarray, epochs: int = 8, seed: int = 0) -> Maps:
    """Fit by CLIP's symmetric loss (arXiv:2103.00020); pictures of one phrase are no wrong answers to each other.

    pictures (n, 1280); texts (p, 384); of (n,) the phrase of each picture.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, t, of_ = torch.from_numpy(pictures), torch.from_numpy(texts), torch.from_numpy(of)
        maps = Maps(x.mean(0), x.std(0).clamp(min=1e-3), text=t.shape[1])
        steps = max(1, len(x) // BATCH) * epochs
        optimizer = torch.optim.AdamW(maps.parameters(), lr=2e-3, weight_decay=0.2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < min(BATCH, len(x)):
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            loss = contrast(maps, F.dropout(x[rows], 0.2), t[of_[rows]], of_[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return maps.eval().requires_grad_(False)


def contrast(maps: Maps, pictures: Tensor, texts: Tensor, of: Tensor) -> Tensor:
    """CLIP's loss over a batch whose rows belong to phrases `of`."""
    logits = maps.pictures(pictures) @ maps.texts(texts).T * maps.log_scale.exp().clamp(max=100)
    same = of[:, None] == of
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(of))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
