"""What a set of pictures holds, found out before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusionfm.data.language import languages
from diffusionfm.data.reader import ShardDataset
from diffusionfm.images import contact_sheet

LOOK = 16  # pixels a side of the picture that near duplicates are told by
ALIKE = 4.0  # root mean square difference of two looks, of 255, up to which they are near duplicates
SHOWN = 48  # pictures on the contact sheet
MOST_COMPARED = 20_000
BLOCK = 2_048
WIDE = 1.25  # times its height from which a picture counts as wide
FROM = {
    "txt": ".txt files",
    "name": "file names",
    "folder": "folder names",
    "trigger": "the trigger alone",
    "shards": "shards",
}


@dataclass(frozen=True)
class Usable:
    """A picture that can be decoded: its name in the set, caption ("" without one), and what it looks like."""

    name: str
    caption: str
    origin: str  # where the caption is from: a file's name, or a key of FROM
    size: tuple[int, int]  # width, height
    transparent: bool
    look: bytes  # of LOOK x LOOK premultiplied RGBA pixels
    heldout: bool = False


@dataclass
class Preflight:
    """What a set of pictures holds. File names are relative to the folder; pairs are (name, reason or other name)."""

    folder: str
    found: int = 0
    captioned: int = 0
    missing: list[str] = field(default_factory=list)  # pictures without a caption of their own
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (name, the one kept)
    near: list[tuple[str, str]] = field(default_factory=list)  # (name, the one it resembles), both kept
    absent: list[str] = field(default_factory=list)  # named by the metadata, but not in the folder
    other: dict[str, int] = field(default_factory=dict)  # files that are not read, by suffix
    origins: dict[str, int] = field(default_factory=dict)  # where the captions used are from
    sizes: list[tuple[int, int]] = field(default_factory=list)  # smallest, median and largest, by area
    shapes: dict[str, int] = field(default_factory=dict)  # square, wide, tall
    enlarged: int = 0  # pictures smaller than they are trained at
    transparent: int = 0
    opaque: int = 0
    languages: dict[str, int] = field(default_factory=dict)

    def describe(self, pictures: Sequence[Usable], size: int) -> None:
        """Fill in what the usable pictures tell together, `size` being the side they are trained at."""
        self.near = near_duplicates(pictures)
        self.origins = dict(Counter(FROM.get(p.origin, p.origin) for p in pictures if p.caption))
        by_area = sorted((p.size for p in pictures), key=lambda wh: wh[0] * wh[1])
        self.sizes = [by_area[0], by_area[len(by_area) // 2], by_area[-1]] if by_area else []
        self.shapes = dict(Counter(shape_of(p.size) for p in pictures).most_common())
        self.enlarged = sum(max(p.size) < size for p in pictures)
        self.transparent = sum(p.transparent for p in pictures)
        self.opaque = len(pictures) - self.transparent
        own = [p.caption for p in pictures if p.caption and p.origin not in ("name", "folder", "trigger")]
        self.languages = languages(own)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The numbers, a line each."""
        lines = [f"{self.folder}: {self.found} pictures, {self.captioned} with a caption"]
        if self.origins:
            lines.append(f"captions: {_counts(self.origins, '{count} from {name}')}")
        if self.sizes:
            smallest, median, largest = (f"{width}x{height}" for width, height in self.sizes)
            shapes = _counts(self.shapes, "{count} {name}")
            small = f", {self.enlarged} enlarged" if self.enlarged else ""
            lines.append(
                f"sizes: {smallest} to {largest}, half of them up to {median}; {shapes}, padded to squares with "
                f"transparency, nothing cropped{small}"
            )
            lines.append(f"background: {self.transparent} transparent, {self.opaque} opaque")
        if self.languages:
            lines.append(f"likely language of the captions: {_counts(self.languages, '{name} {count}')}")
        return lines

    def faults(self) -> list[str]:
        """What is left out, missing or double, a line each."""
        lines = [f"no caption: {name}" for name in self.missing]
        lines += [f"unreadable: {name}: {reason}" for name, reason in self.unreadable]
        lines += [f"duplicate: {name} is {first}, left out" for name, first in self.duplicates]
        lines += [f"near duplicate: {name} looks like {first}, both are used" for name, first in self.near]
        lines += [f"not found: {name}, named by the metadata" for name in self.absent]
        lines += [f"not read: {count} {suffix} files" for suffix, count in self.other.items()]
        return lines

    def __str__(self) -> str:
        return "\n".join([*self.summary(), *self.faults()])


def examine(name: str, picture: Image.Image, caption: str, origin: str, heldout: bool = False) -> Usable:
    """What a decoded RGBA picture of a set is like."""
    small = picture.convert("RGBa").resize((LOOK, LOOK), Image.Resampling.BOX)
    alpha = picture.getchannel("A").histogram()
    return Usable(name, caption, origin, picture.size, sum(alpha[:255]) > 0, small.tobytes(), heldout)


def examine_shards(dataset: ShardDataset, size: int) -> tuple[Preflight, list[dict[str, Any]]]:
    """The report on shards, every sample decoded, and their first samples."""
    report = Preflight(str(dataset.paths[0].parent))
    pictures: list[Usable] = []
    shown: list[dict[str, Any]] = []
    for sample in dataset:
        name, picture = sample["meta"].get("name") or sample["key"], sample["picture"]
        pictures.append(examine(name, picture, sample["caption"], "shards"))
        report.captioned += bool(sample["caption"])
        if len(shown) < SHOWN:
            shown.append(sample)
    report.found = len(pictures) + len(dataset.problems)
    report.unreadable = [("a sample", problem) for problem in dataset.problems]
    report.describe(pictures, size)
    return report, shown


def near_duplicates(pictures: Sequence[Usable]) -> list[tuple[str, str]]:
    """(name, an earlier name) of pictures that look alike at 16 x 16 pixels, for up to 20,000 pictures."""
    pictures = pictures[:MOST_COMPARED]
    if not pictures:
        return []
    looks = np.stack([np.frombuffer(p.look, dtype=np.uint8) for p in pictures]).astype(np.float32)
    squares, limit = (looks**2).sum(1), ALIKE**2 * looks.shape[1]
    found = []
    for start in range(0, len(looks), BLOCK):
        block = looks[start : start + BLOCK]
        distance = squares[start : start + BLOCK, None] + squares[None] - 2 * block @ looks.T
        for row, alike in enumerate(distance <= limit):
            first = int(np.argmax(alike[: start + row + 1]))
            if first < start + row:
                found.append((pictures[start + row].name, pictures[first].name))
    return found


def shape_of(size: tuple[int, int]) -> str:
    """Square, wide or tall, a quarter more being enough."""
    width, height = size
    return "wide" if width > WIDE * height else "tall" if height > WIDE * width else "square"


def preflight_sheet(samples: Sequence[dict[str, Any]]) -> Image.Image:
    """A contact sheet of samples with their captions."""
    labels = [sample["caption"] or "(no caption)" for sample in samples]
    return contact_sheet([sample["picture"] for sample in samples], labels, columns=min(8, len(samples)))


def other_files(paths: Iterable[Path], known: set[str]) -> dict[str, int]:
    """How many files there are of each suffix that is not known."""
    return dict(
        Counter(
            path.suffix.lower() or "(no suffix)" for path in paths if path.suffix.lower() not in known
        ).most_common()
    )


def _counts(counts: dict[str, int], form: str) -> str:
    return ", ".join(form.format(name=name, count=count) for name, count in counts.items())
