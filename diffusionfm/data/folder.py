"""A user's own pictures: a folder with .txt files, metadata.jsonl or a CSV, checked, packed into shards."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from diffusionfm.data.reader import DECODE_ERRORS, MAX_PIXELS, to_rgba
from diffusionfm.data.shards import ShardWriter

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FILE_COLUMNS = ("file_name", "image", "file", "filename", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")

Progress = Callable[[int, int], None]
Captioned = tuple[str, str, str]  # name, caption, where the caption is from


@dataclass
class Preflight:
    """What a folder of pictures holds. File names are relative to the folder; pairs are (name, reason)."""

    folder: str
    found: int = 0
    captioned: int = 0
    missing: list[str] = field(default_factory=list)  # pictures without a caption
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (name, the one kept)
    absent: list[str] = field(default_factory=list)  # named by the metadata, but not in the folder

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.found} pictures, {self.captioned} with a caption"]
        lines += [f"no caption: {name}" for name in self.missing]
        lines += [f"unreadable: {name}: {reason}" for name, reason in self.unreadable]
        lines += [f"duplicate: {name} is {first}, left out" for name, first in self.duplicates]
        lines += [f"not found: {name}, named by the metadata" for name in self.absent]
        return "\n".join(lines)


class FolderDataset:
    """The captioned pictures of a folder (and its sub-folders) as samples, like those of ShardDataset.

    folder: pictures with a .txt of the same name beside each; or metadata.jsonl (file_name, text or caption),
        or metadata.csv, or the only CSV there is, with such columns. A metadata caption goes before a .txt.
    size: side in pixels of the square RGBA picture made of each, turned as EXIF says, padded transparently.
    captions: what to do about pictures without one: "refuse" (ValueError that names them), "skip", or "name"
        (the words of the file name).

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
        if captions not in ("refuse", "name", "skip"):
            raise ValueError(f'captions is {captions!r}; it must be "refuse", "name" or "skip"')
        if not 8 <= size <= 4096:
            raise ValueError(f"size is {size}; it must be from 8 to 4096 pixels")
        self.folder = Path(folder)
        self.size = size
        self.report, self._samples = _scan(self.folder, captions, progress)
        if captions == "refuse" and self.report.missing:
            raise ValueError(
                f"{len(self.report.missing)} of {self.report.found} pictures in {folder} have no caption "
                f"({_some(self.report.missing)}); write NAME.txt beside each, or choose captions skip or name"
            )
        if not self._samples:
            wrong = [f"{name}: {reason}" for name, reason in self.report.unreadable] + self.report.missing
            raise ValueError(
                f"{folder} has no usable picture with a caption ({_some(wrong) or 'no pictures'}); "
                f"put {', '.join(sorted(SUFFIXES))} files there, and captions beside them"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"key", "picture" (RGBA, size x size), "caption", "meta" (name, caption_from)} of picture i."""
        name, caption, origin = self._samples[i]
        picture = square(read_picture(self.folder / name), self.size)
        return {
            "key": f"{i:08d}",
            "picture": picture,
            "caption": caption,
            "meta": {"name": name, "caption_from": origin, "captions": [caption]},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def preflight(folder: str | os.PathLike, progress: Progress | None = None) -> Preflight:
    """Checks a folder as FolderDataset would, every picture decoded; missing captions only reported."""
    return _scan(Path(folder), "skip", progress)[0]


def pack_folder(
    src: str | os.PathLike,
    out_dir: str | os.PathLike,
    size: int = 128,
    captions: str = "refuse",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Preflight:
    """Writes a folder of pictures as shards, source "user", licence "".

    What was left out is in the report returned, and unreadable pictures are in the parquet too. Errors as
    FolderDataset and ShardWriter."""
    if Path(out_dir).resolve().is_relative_to(Path(src).resolve()):
        raise ValueError(f"{out_dir} lies in {src}; write the shards to a folder outside the pictures")
    common = dict.fromkeys(("package", "version", "licence", "attribution"), "")
    common |= {"source": "user", "split": "train"}
    with ShardWriter(out_dir, overwrite=overwrite) as writer:
        dataset = FolderDataset(src, size, captions)
        for i, sample in enumerate(dataset):
            writer.write(sample["key"], sample["picture"], sample["caption"], {**common, **sample["meta"]})
            if progress:
                progress(i + 1, len(dataset))
        for i, (name, reason) in enumerate(dataset.report.unreadable):
            writer.fail(f"unreadable-{i:08d}", reason, {**common, "name": name})
    return dataset.report


def read_picture(path: str | os.PathLike) -> Image.Image:
    """RGBA picture of a file (PNG, JPEG, WebP, GIF's first frame, BMP), turned upright by its EXIF.

    Raises one of DECODE_ERRORS when it cannot be decoded or has more than 64 Mpixel."""
    with Image.open(path, formats=list(FORMATS)) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} is more than {MAX_PIXELS // 2**20} Mpixel")
        return to_rgba(ImageOps.exif_transpose(picture))


def square(picture: Image.Image, size: int) -> Image.Image:
    """An RGBA picture scaled to fit a transparent size x size canvas, centred.

    Lanczos over premultiplied colour (Pillow's `resize` premultiplies RGBA), so no dark fringes appear."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(picture, ((size - width) // 2, (size - height) // 2))
    return canvas


def words_of_name(name: str) -> str:
    """A caption from a file name: "redApple_big-02.png" -> "red apple big"; '' when it has no words."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", Path(name).stem)
    words = re.sub(r"[\W_]+", " ", words).strip().lower()
    words = re.sub(r"( copy| \d+)+$|^\d+( \d+)*$", "", words).strip()
    return words if re.search(r"[^\W\d]", words) else ""


def _scan(folder: Path, choice: str, progress: Progress | None) -> tuple[Preflight, list[Captioned]]:
    """The report, and the usable pictures in name order."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of pictures and captions")
    captions, origin = _metadata(folder)
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _hidden(path.relative_to(folder))
    )
    report = Preflight(str(folder), found=len(names), absent=sorted(set(captions) - set(names)))
    samples: list[Captioned] = []
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        if progress:
            progress(i + 1, len(names))
        path = folder / name
        caption, source = captions.get(name, ""), origin
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError("a link that leads outside the folder")
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest not in seen and read_picture(path).getchannel("A").getbbox() is None:
                raise ValueError("nothing but transparency")
            if not caption and path.with_suffix(".txt").is_file():
                caption, source = _text_beside(folder, path), "txt"
        except DECODE_ERRORS as error:
            report.unreadable.append((name, str(error)))
            continue
        if digest in seen:
            report.duplicates.append((name, seen[digest]))
            continue
        seen[digest] = name
        report.captioned += bool(caption)
        if not caption and choice == "name":
            caption, source = words_of_name(name), "name"
        if caption:
            samples.append((name, caption, source))
        if not caption or source == "name":
            report.missing.append(name)
    return report, samples


def _text_beside(folder: Path, picture: Path) -> str:
    path = picture.with_suffix(".txt")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path.name} is a link that leads outside the folder")
    return " ".join(path.read_text(encoding="utf-8-sig").split())


def _metadata(folder: Path) -> tuple[dict[str, str], str]:
    """Captions by picture from metadata.jsonl, or else the CSV, and which file that was."""
    jsonl = folder / "metadata.jsonl"
    tables = sorted(folder.glob("*.csv"))
    named = [path for path in tables if path.name == "metadata.csv"] or tables
    if jsonl.is_file():
        path, rows = jsonl, _jsonl_rows(jsonl)
    elif len(named) == 1:
        path, rows = named[0], _csv_rows(named[0])
    elif named:
        raise ValueError(f"{folder} has {len(named)} CSV files; name the one with the captions metadata.csv")
    else:
        return {}, ""
    captions: dict[str, str] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        if not isinstance(name, str):
            raise ValueError(f"{where}: no file_name; each row needs the name of its picture")
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
        if not isinstance(caption, str):
            raise ValueError(f"{where}: the caption must be text")
        captions[_inside(folder, name, where)] = " ".join(caption.split())
    return captions, path.name


def _inside(folder: Path, name: str, where: str) -> str:
    """The name in its plain form. ValueError where it leads outside the folder."""
    plain = os.path.normpath(name.replace("\\", "/"))
    outside = plain.startswith(("..", "/")) or re.match(r"[A-Za-z]:", plain) or "\0" in plain
    if outside or not (folder / plain).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name!r} leads outside the folder; name pictures that lie in it")
    return Path(plain).as_posix()


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); each line is one object") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: no object like {{"file_name": "a.png", "text": "..."}}')
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    columns = [(column or "").strip().lower() for column in reader.fieldnames or []]
    if not set(columns) & set(FILE_COLUMNS) or not set(columns) & set(CAPTION_COLUMNS):
        raise ValueError(f"{path}: its first line must name the columns, file_name and text")
    reader.fieldnames = columns
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; save it as a plain CSV") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
