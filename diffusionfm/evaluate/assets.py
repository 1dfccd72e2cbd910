"""What ships with the instrument: held-out pictures, projections, a compressed index of training pictures, phrases.

The folder `assets/` holds safetensors and JSON alone, 5 MB at most; `diffusionfm.evaluate.build` makes it.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "assets"
FILES = ("held_out.safetensors", "instrument.safetensors", "words.json")


@dataclass
class Assets:
    """words: everything textual (see `build.words`). arrays: everything numeric. digest: SHA-256 over the files."""

    words: dict[str, Any]
    arrays: dict[str, np.ndarray]
    webp: np.ndarray
    digest: str

    def held_out(self) -> list[Image.Image]:
        """The held-out pictures, RGBA, in the order of words["held_out"]."""
        ends = self.arrays["webp_ends"].tolist()
        parts = [self.webp[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]
        return [Image.open(io.BytesIO(part), formats=["WEBP"]).convert("RGBA") for part in parts]


def load_assets(folder: Path = FOLDER) -> Assets:
    """The instrument's assets; `ValueError` when a file is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: install the package again")
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return Assets(
        json.loads((folder / "words.json").read_text(encoding="utf-8")),
        load_file(folder / "instrument.safetensors"),
        load_file(folder / "held_out.safetensors")["webp"],
        digest.hexdigest(),
    )
