"""What a set of pictures holds, found out before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from diffusionfm.data.language import languages
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
    """A picture that can be decoded: its name in the set, caption ("" without one), and what it looks like.

    `read` decodes it again, upright, RGBA."""

    name: str
    caption: str
    origin: str  # where the caption is from: a file's name, or a key of FROM
    size: tuple[int, int]  # width, height
    transparent: bool
    look: bytes  # of LOOK x LOOK premultiplied RGBA pixels
    read: Callable[[], Image.Image]
    heldout: bool = False
    more: tuple[str, ...] = ()  # further captions, which only shards have


@dataclass
class Preflight:
    """What a set of pictures holds. Names are relative to the folder, in shards those told or of the picture's member.

    Pairs are (name, reason or other name)."""

    folder: str
    found: int = 0
    captioned: int = 0
    missing: list[str] = field(default_factory=list)  # pictures without a caption of their own
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (name, the one kept)
    near: list[tuple[str, str]] = field(default_factory=list)  # (name, the one it resembles), both kept
    absent: list[str] = field(default_factory=list)  # named by the metadata, but not in the folder
    again: list[tuple[str, str]] = field(default_factory=list)  # (name, the table whose last caption is used)
    unused: list[tuple[str, str]] = field(
        default_factory=list
    )  # (a .txt or a table that is not read, reason)
    other: dict[str, int] = field(default_factory=dict)  # files that are not read, by suffix
    origins: dict[str, int] = field(default_factory=dict)  # where the captions used are from
    sizes: list[tuple[int, int]] = field(default_factory=list)  # smallest, median and largest, by area
    shapes: dict[str, int] = field(default_factory=dict)  # square, wide, tall
    enlarged: int = 0  # pictures smaller than they are trained at
    transparent: int = 0
    opaque: int = 0
    barred: int = 0  # opaque ones that are not square: what pads them is learned with them
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
        self.barred = sum(not p.transparent and p.size[0] != p.size[1] for p in pictures)
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
            if self.barred:
                lines.append(
                    f"{self.barred} opaque pictures are not square: the model learns their transparent bars too, "
                    "unless you crop them to squares first"
                )
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
        lines += [f"several captions: {name}, the last in {file} is used" for name, file in self.again]
        lines += [f"not read: {name}, {reason}" for name, reason in self.unused]
        lines += [f"not read: {count} {suffix} files" for suffix, count in self.other.items()]
        return lines

    def __str__(self) -> str:
        return "\n".join([*self.summary(), *self.faults()])


def examine(
    name: str, read: Callable[[], Image.Image], captions: Sequence[str], origin: str, heldout: bool = False
) -> Usable:
    """What a picture of a set is like. ValueError when it shows nothing, and whatever `read` raises."""
    picture = read()
    alpha = picture.getchannel("A")
    if alpha.getbbox() is None:
        raise ValueError("nothing but transparency")
    small = picture.convert("RGBa").resize((LOOK, LOOK), Image.Resampling.BOX)
    transparent = sum(alpha.histogram()[:255]) > 0
    caption, *more = captions
    return Usable(
        printable(name),
        caption,
        origin,
        picture.size,
        transparent,
        small.tobytes(),
        read,
        heldout,
        tuple(more),
    )


def printable(name: str) -> str:
    """A name as it can be written: bytes of a file's name that are no UTF-8 as their escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


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


def _counts(counts: dict[str, int], form: str) -> str:
    return ", ".join(form.format(name=name, count=count) for name, count in counts.items())
