"""Every distinct picture of the corpus described once, and kept in a folder: what the instrument is built from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from diffusionfm.data.icons.compose import SOURCE
from diffusionfm.data.reader import ShardDataset
from diffusionfm.evaluate.describe import Described, Eye
from diffusionfm.images import write_atomic

TOLD = ("phrase", "source", "split", "caption", "background")


@dataclass
class Corpus:
    """Pictures without a drawn background, and no compositions.

    Row i of `seen` is sample `numbers[i]` of the shards, told by `rows[i]`."""

    seen: Described
    rows: list[dict[str, Any]]
    numbers: list[int]

    def of(self, split: str) -> list[int]:
        """The rows of a split."""
        return [i for i, row in enumerate(self.rows) if row["split"] == split]


def read_corpus(shards: str | Path, cache: Path, chunk: int = 2048) -> Corpus:
    """Describe the corpus, or read what an earlier call left in `cache`; a call that was stopped goes on."""
    dataset = ShardDataset(shards)
    told = [dict(zip(TOLD, row, strict=True)) for row in dataset.columns(*TOLD)]
    numbers = [i for i, row in enumerate(told) if not row["background"] and row["source"] != SOURCE]
    which = hashlib.sha256(np.array(numbers).tobytes()).hexdigest()[:8]
    folder = cache / f"{dataset.fingerprint[:16]}-{which}"
    folder.mkdir(parents=True, exist_ok=True)
    eye: Eye | None = None
    parts = []
    for start in range(0, len(numbers), chunk):
        file = folder / f"{start:06d}.safetensors"
        if not file.exists():
            eye = eye or Eye()
            seen = eye(dataset[i]["picture"] for i in numbers[start : start + chunk])
            stored: dict[str, np.ndarray] = {
                "features": seen.features.astype(np.float16),
                "coarse": (seen.coarse * 255).round().astype(np.uint8),
            }
            write_atomic(file, save(stored))
            print(json.dumps({"described": start + len(seen), "of": len(numbers)}), flush=True)
        parts.append(load_file(file))
    features = np.concatenate([part["features"] for part in parts]).astype(np.float32)
    coarse = np.concatenate([part["coarse"] for part in parts]).astype(np.float32) / 255
    return Corpus(Described(features, coarse), [told[i] for i in numbers], numbers)
