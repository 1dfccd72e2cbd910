"""A user's own pictures: a folder with .txt files, metadata.jsonl or a CSV, or shards, checked; a folder packed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionfm.data import captions as caption_sources
from diffusionfm.data.icons.sources import share
from diffusionfm.data.preflight import SHOWN, Preflight, Usable, examine, printable
from diffusionfm.data.reader import PICTURES, ShardDataset, told_captions
from diffusionfm.data.shards import ShardWriter
from diffusionfm.inputs import DECODE_ERRORS, contain, read_picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
NOTES = {".txt", ".jsonl", ".csv", ".md"}  # files beside pictures, the captions among them told by name

Progress = Callable[[int, int], None]


class PictureDataset:
    """Captioned pictures that `scan` or `scan_shards` found, as samples like those of ShardDataset.

    size: side in pixels of the square RGBA picture made of each, turned as EXIF says, padded transparently.
    captions: what was done about pictures without one: "refuse" (ValueError that names them), "skip", "name" or
        "folder" (the words of the file's or the folder's name), or "trigger" ("[trigger]", for fine-tuning).

    `report`, a Preflight, names what is left out: unreadable pictures, duplicates. ValueError, with the fix, where
    no picture with a caption is left.
    """

    def __init__(self, report: Preflight, pictures: Sequence[Usable], size: int, captions: str) -> None:
        if captions == "refuse" and report.missing:
            raise ValueError(
                f"{len(report.missing)} of {report.found} pictures in {report.folder} have no caption "
                f"({some(report.missing)}); write NAME.txt beside each, or choose captions skip, name, "
                "folder or trigger"
            )
        self.report = report
        self.size = size
        self.pictures = [picture for picture in pictures if picture.caption]
        if not self.pictures:
            wrong = [f"{name}: {reason}" for name, reason in report.unreadable] + report.missing
            raise ValueError(
                f"{report.folder} has no usable picture with a caption ({some(wrong) or 'no pictures'}); "
                "put .png, .jpg or .webp files there, and captions beside them"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"key", "picture" (RGBA, size x size), "caption", "meta" (name, caption_from, captions, split)} of one."""
        return sample_of(self.pictures[i], i, self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def captions(self) -> list[str]:
        """The caption of each picture, in order."""
        return [picture.caption for picture in self.pictures]

    @property
    def has_held_out(self) -> bool:
        """Whether the set itself keeps pictures from training."""
        return any(picture.heldout for picture in self.pictures)


class FolderDataset(PictureDataset):
    """The captioned pictures of a folder (and its sub-folders).

    folder: pictures with a .txt of the same name beside each; or metadata.jsonl (file_name, text or caption),
        or metadata.csv, or the only CSV there is, with such columns; or Hugging Face's imagefolder, with such a
        file in train/, whose validation/ or test/ become the split "heldout". A metadata caption goes before a .txt.

    The rest is as of PictureDataset; ValueError too for metadata that cannot be read or leads outside the folder.
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
        super().__init__(*scan(Path(folder), size, captions, progress), size, captions)


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


def sample_of(picture: Usable, i: int, size: int) -> dict[str, Any]:
    """A usable picture as PictureDataset gives it, `i` being its place."""
    captions = [picture.caption, *picture.more]
    meta = {"name": picture.name, "caption_from": picture.origin, "captions": captions}
    return {
        "key": f"{i:08d}",
        "picture": square(picture.read(), size),
        "caption": picture.caption,
        "meta": meta | {"split": "heldout" if picture.heldout else "train"},
    }


def first_samples(pictures: Sequence[Usable], size: int) -> list[dict[str, Any]]:
    """As many of the pictures as a contact sheet shows, captioned or not."""
    return [sample_of(picture, i, size) for i, picture in enumerate(pictures[:SHOWN])]


# ---- looking through ------------------------------------------------------------------------------------------


def scan(
    folder: Path, size: int = 128, choice: str = "refuse", progress: Progress | None = None
) -> tuple[Preflight, list[Usable]]:
    """The report on a folder, and the pictures that can be decoded, each once, in name order, captioned where possible.

    choice: `captions` of PictureDataset; nothing is refused. ValueError for metadata as of FolderDataset."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of pictures and captions")
    told = caption_sources.tables(folder)
    table = told.captions
    inside = (path for path in folder.rglob("*") if not hidden(path.relative_to(folder)))
    files = sorted(path for path in inside if path.is_file())
    names = sorted(p.relative_to(folder).as_posix() for p in files if p.suffix.lower() in SUFFIXES)
    report = Preflight(str(folder), found=len(names))
    report.absent = [printable(name) for name in sorted(set(table) - set(names))]
    report.again = [(printable(name), printable(file)) for name, file in sorted(told.again.items())]
    beside = [path.relative_to(folder).as_posix() for path in files]
    unused = caption_sources.unused(beside, names, told.read)
    report.unused = [(printable(name), printable(reason)) for name, reason in unused]
    suffixes = Counter(printable(path.suffix.lower()) or "(no suffix)" for path in files)
    report.other = {suffix: n for suffix, n in suffixes.most_common() if suffix not in SUFFIXES | NOTES}
    heldout = caption_sources.held_out(names)
    looks = [(name, partial(_look, folder, name, table, name in heldout)) for name in names]
    return report, _survey(report, looks, size, choice, progress)


def scan_shards(path: Path, size: int = 128, choice: str = "refuse") -> tuple[Preflight, list[Usable]]:
    """The same of a shard, or of a folder of shards, in their order; the name of a sample without one is its key."""
    dataset = ShardDataset(path, needs=("picture",))
    report = Preflight(str(path), found=len(dataset))
    for problem in dataset.problems:
        shard, _, reason = problem.partition(": ")
        report.unreadable.append((shard, reason))
    report.other = {f".{kind}" if kind else "(no suffix)": n for kind, n in dataset.ignored.most_common()}
    looks = [(_member_name(dataset, i), partial(_look_into, dataset, i)) for i in range(len(dataset))]
    return report, _survey(report, looks, size, choice)


def _survey(
    report: Preflight,
    looks: Sequence[tuple[str, Callable[[], tuple[str, Usable]]]],
    size: int,
    choice: str,
    progress: Progress | None = None,
) -> list[Usable]:
    """Take every look, (a name, what gives digest and picture), and fill in the report; what `scan` returns."""
    pictures: list[Usable] = []
    seen: dict[str, str] = {}
    for i, (name, look) in enumerate(looks):
        if progress:
            progress(i + 1, len(looks))
        try:
            digest, picture = look()
        except DECODE_ERRORS as error:
            reason = str(error).replace(f"{report.folder}{os.sep}", "")
            report.unreadable.append((printable(name), printable(reason)))
            continue
        if digest in seen:
            report.duplicates.append((picture.name, seen[digest]))
            continue
        seen[digest] = picture.name
        report.captioned += bool(picture.caption)
        if not picture.caption:
            report.missing.append(picture.name)
            caption = caption_sources.caption_for(name, choice)
            picture = replace(picture, caption=caption, origin=choice if caption else "")
        pictures.append(picture)
    report.describe(pictures, size)
    return pictures


def _look(folder: Path, name: str, table: dict[str, tuple[str, str]], heldout: bool) -> tuple[str, Usable]:
    """(digest of the file, the picture with its own caption or "")."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a link that leads outside the folder")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    caption, origin = table.get(name, ("", ""))
    if not caption:
        caption, origin = caption_sources.text_beside(folder, path), "txt"
    return digest, examine(name, partial(read_picture, path), [caption], origin, heldout)


def _look_into(dataset: ShardDataset, i: int) -> tuple[str, Usable]:
    """(digest of the picture's bytes, sample i of shards with its own captions or "")."""
    members, meta = dataset.raw(i), dataset.meta(i)
    digest = hashlib.sha256(next(members[kind] for kind in PICTURES if kind in members)).hexdigest()
    told = told_captions(meta) or [members.get("txt", b"").decode("utf-8-sig")]
    captions = [caption_sources.clean_caption(text, "the caption") for text in told]
    if captions == [""]:
        captions = [caption_sources.caption_in(meta)]
    name, heldout = str(meta.get("name") or _member_name(dataset, i)), meta.get("split") == "heldout"
    return digest, examine(name, lambda: dataset.read(i)["picture"], captions, "shards", heldout)


def _member_name(dataset: ShardDataset, i: int) -> str:
    """The name in its tar of the picture of sample i."""
    return f"{dataset.key(i)}.{next(kind for kind in PICTURES if kind in dataset.members(i))}"


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
