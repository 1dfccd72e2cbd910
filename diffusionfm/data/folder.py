"""A user's own pictures: a folder with .txt files, metadata.jsonl or a CSV, checked, packed into shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionfm.data import captions as caption_sources
from diffusionfm.data.icons.sources import share
from diffusionfm.data.preflight import SHOWN, Preflight, Usable, examine, other_files
from diffusionfm.data.shards import ShardWriter
from diffusionfm.inputs import DECODE_ERRORS, contain, read_picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
NOTES = {".txt", ".jsonl", ".csv", ".md"}  # files beside pictures that nobody misses

Progress = Callable[[int, int], None]


class FolderDataset:
    """The captioned pictures of a folder (and its sub-folders) as samples, like those of ShardDataset.

    folder: pictures with a .txt of the same name beside each; or metadata.jsonl (file_name, text or caption),
        or metadata.csv, or the only CSV there is, with such columns; or Hugging Face's imagefolder, with such a
        file in train/, whose validation/ or test/ become the split "heldout". A metadata caption goes before a .txt.
    size: side in pixels of the square RGBA picture made of each, turned as EXIF says, padded transparently.
    captions: what to do about pictures without one: "refuse" (ValueError that names them), "skip", "name" or
        "folder" (the words of the file's or the folder's name), or "trigger" ("[trigger]", for fine-tuning).

    `report`, a Preflight, names what is left out: unreadable pictures, duplicates. ValueError, with the fix,
    for a folder without usable pictures and for metadata that cannot be read or leads outside the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        size: int = 128,
        captions: str = "refuse",
        progress: Progress | None = None,
    ) -> None:
        if captions not in caption_sources.CHOICES:
            raise ValueError(
                f"captions is {captions!r}; it must be one of {', '.join(caption_sources.CHOICES)}"
            )
        if not 8 <= size <= 4096:
            raise ValueError(f"size is {size}; it must be from 8 to 4096 pixels")
        self.folder = Path(folder)
        self.size = size
        self.report, pictures = scan(self.folder, size, captions, progress)
        if captions == "refuse" and self.report.missing:
            raise ValueError(
                f"{len(self.report.missing)} of {self.report.found} pictures in {folder} have no caption "
                f"({_some(self.report.missing)}); write NAME.txt beside each, or choose captions skip, name, "
                "folder or trigger"
            )
        self._samples = [picture for picture in pictures if picture.caption]
        if not self._samples:
            wrong = [f"{name}: {reason}" for name, reason in self.report.unreadable] + self.report.missing
            raise ValueError(
                f"{folder} has no usable picture with a caption ({_some(wrong) or 'no pictures'}); "
                f"put {', '.join(sorted(SUFFIXES))} files there, and captions beside them"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"key", "picture" (RGBA, size x size), "caption", "meta" (name, caption_from, split)} of picture i."""
        return sample_of(self.folder, self._samples[i], i, self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def captions(self) -> list[str]:
        """The caption of each picture, in order."""
        return [picture.caption for picture in self._samples]

    @property
    def has_held_out(self) -> bool:
        """Whether the folder itself keeps pictures from training."""
        return any(picture.heldout for picture in self._samples)


def preflight(
    folder: str | os.PathLike, size: int = 128, captions: str = "refuse", progress: Progress | None = None
) -> tuple[Preflight, list[dict[str, Any]]]:
    """The report on a folder as FolderDataset would use it, and its first pictures as samples, captioned or not.

    Every picture is decoded; missing captions are only reported. Errors as FolderDataset's about metadata."""
    report, pictures = scan(Path(folder), size, captions, progress)
    return report, [sample_of(Path(folder), picture, i, size) for i, picture in enumerate(pictures[:SHOWN])]


def pack_folder(
    src: str | os.PathLike,
    out_dir: str | os.PathLike,
    size: int = 128,
    captions: str = "refuse",
    overwrite: bool = False,
    progress: Progress | None = None,
    held_out: float = 0.02,
) -> Preflight:
    """Writes a folder of pictures as shards, source "user", licence "".

    held_out: share of captions, at least one of two or more, whose pictures are kept from training to judge by; 0 for
    none. An imagefolder that has its own validation/ or test/ keeps that instead.

    What was left out is in the report returned, and unreadable pictures are in the parquet too. Errors as
    FolderDataset, ShardWriter and held_out_captions."""
    if Path(out_dir).resolve().is_relative_to(Path(src).resolve()):
        raise ValueError(f"{out_dir} lies in {src}; write the shards to a folder outside the pictures")
    common = dict.fromkeys(("package", "version", "licence", "attribution"), "")
    common |= {"source": "user"}
    with ShardWriter(out_dir, overwrite=overwrite) as writer:
        dataset = FolderDataset(src, size, captions)
        held = set() if dataset.has_held_out else held_out_captions(dataset.captions, held_out)
        for i, sample in enumerate(dataset):
            meta = {**common, **sample["meta"]} | ({"split": "heldout"} if sample["caption"] in held else {})
            writer.write(sample["key"], sample["picture"], sample["caption"], meta)
            if progress:
                progress(i + 1, len(dataset))
        for i, (name, reason) in enumerate(dataset.report.unreadable):
            writer.fail(f"unreadable-{i:08d}", reason, {**common, "name": name})
    return dataset.report


def held_out_captions(captions: Sequence[str], fraction: float) -> set[str]:
    """The captions kept from training: a caption's place is a hash of its words, so more pictures move none of them.

    ValueError unless `fraction` is from 0 to below 1; of two or more captions at least one is held out, and one not."""
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out is a share, from 0 to below 1, not {fraction}")
    places = sorted((share(f"held-out:{' '.join(c.lower().split())}"), c) for c in set(captions))
    count = max(1, sum(place < fraction for place, _ in places))
    return {caption for _, caption in places[: min(count, len(places) - 1)]} if fraction else set()


def square(picture: Image.Image, size: int) -> Image.Image:
    """An RGBA picture scaled to fit a transparent size x size canvas, centred."""
    return contain(picture, size, size)


def hidden(path: Path) -> bool:
    """Whether a file is one that systems put there: .DS_Store, ._picture.png, __MACOSX/..."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def sample_of(folder: Path, picture: Usable, i: int, size: int) -> dict[str, Any]:
    """A usable picture as FolderDataset gives it, `i` being its place."""
    meta = {"name": picture.name, "caption_from": picture.origin, "captions": [picture.caption]}
    return {
        "key": f"{i:08d}",
        "picture": square(read_picture(folder / picture.name), size),
        "caption": picture.caption,
        "meta": meta | {"split": "heldout" if picture.heldout else "train"},
    }


def scan(
    folder: Path, size: int, choice: str, progress: Progress | None = None
) -> tuple[Preflight, list[Usable]]:
    """The report on a folder, and the pictures that can be decoded, each once, in name order, captioned where possible.

    choice: see FolderDataset; nothing is refused."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of pictures and captions")
    table = caption_sources.tables(folder)
    inside = (path for path in folder.rglob("*") if not hidden(path.relative_to(folder)))
    files = sorted(path for path in inside if path.is_file())
    names = sorted(p.relative_to(folder).as_posix() for p in files if p.suffix.lower() in SUFFIXES)
    report = Preflight(str(folder), found=len(names), absent=sorted(set(table) - set(names)))
    report.other = other_files(files, SUFFIXES | NOTES)
    heldout = caption_sources.held_out(names)
    pictures: list[Usable] = []
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        if progress:
            progress(i + 1, len(names))
        try:
            digest, picture = _look(folder, name, table, seen, name in heldout)
        except DECODE_ERRORS as error:
            report.unreadable.append((name, str(error).replace(f"{folder}{os.sep}", "")))
            continue
        if picture is None:
            report.duplicates.append((name, seen[digest]))
            continue
        seen[digest] = name
        report.captioned += bool(picture.caption)
        if not picture.caption:
            report.missing.append(name)
            caption = caption_sources.caption_for(name, choice)
            picture = replace(picture, caption=caption, origin=choice if caption else "")
        pictures.append(picture)
    report.describe(pictures, size)
    return report, pictures


def _look(
    folder: Path, name: str, table: dict[str, tuple[str, str]], seen: dict[str, str], heldout: bool
) -> tuple[str, Usable | None]:
    """(digest of the file, the picture with its own caption or "", or None for one that was seen before)."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a link that leads outside the folder")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest in seen:
        return digest, None
    picture = read_picture(path)
    if picture.getchannel("A").getbbox() is None:
        raise ValueError("nothing but transparency")
    caption, origin = table.get(name, ("", ""))
    if not caption:
        caption, origin = caption_sources.text_beside(folder, path), "txt"
    return digest, examine(name, picture, caption, origin, heldout)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
