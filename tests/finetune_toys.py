"""What the tests of fine-tuning share: a folder of drawn circles, short settings, and looks at what a run left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

WEIGHTS = "adapter_model.safetensors"
COLORS = ("red", "blue", "green", "orange")
SHORT: dict[str, Any] = {
    "steps": 4,
    "rank": 2,
    "batch_size": 4,
    "sample_every": 2,
    "prompts": ["a red apple"],
    "device": "cpu",
}


def draw_pictures(folder: Path, count: int = 12) -> Path:
    """Circles in four colours, a caption beside each; every third one is opaque and not square."""
    folder.mkdir()
    for k in range(count):
        opaque = k % 3 == 0
        picture = Image.new("RGB", (40, 28), "white") if opaque else Image.new("RGBA", (32, 32))
        ImageDraw.Draw(picture).ellipse((4 + k % 5, 4, 24, 24), fill=COLORS[k % 4])
        picture.save(folder / f"circle {k:02d}.{'jpg' if opaque else 'png'}")
        (folder / f"circle {k:02d}.txt").write_text(f"a {COLORS[k % 4]} circle, my style")
    return folder


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: hash and time of the last change."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in files
    }


def lines(out: Path) -> list[dict]:
    """The metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
