"""Where a picture's caption is from: metadata.jsonl, a CSV, a .txt beside it, or the words of its names."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_prompt

FILE_COLUMNS = ("file_name", "image", "file", "filename", "path", "image_file_name")
CAPTION_COLUMNS = ("text", "caption", "prompt")
CHOICES = ("refuse", "name", "folder", "trigger", "skip")
TRIGGER = "[trigger]"  # stands in captions and prompts for the word that fine-tuning gives the subject
SPLITS = ("validation", "valid", "val", "dev", "test", "eval")  # beside train/: pictures to judge by


@dataclass
class Tables:
    """What the tables of a folder say. captions: name -> (caption, the file it is from). read: those files.

    again: (name, the file whose caption is used) of pictures that are told other captions too."""

    captions: dict[str, tuple[str, str]] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    again: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, caption: str, file: str) -> None:
        """The last caption of a picture holds; an empty one takes the place of none."""
        before, _ = self.captions.get(name, ("", ""))
        if caption or not before:
            self.captions[name] = caption, file
        if before and before != caption:
            self.again[name] = self.captions[name][1]


def tables(folder: Path) -> Tables:
    """What every metadata.jsonl, metadata.csv and the root's only CSV say.

    Names are relative to `folder`, in the files to the folder of each: Hugging Face's imagefolder has one a split.
    A JSONL goes before a CSV beside it. ValueError, with file and line, for what cannot be read or leads outside.
    """
    found = Tables()
    for path in _table_files(folder):
        file = path.relative_to(folder).as_posix()
        found.read.append(file)
        rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
        for line, row in rows:
            found.add(*_pair(folder, path, line, row), file)
    return found


def replace_captions(folder: Path, captions: dict[str, str]) -> None:
    """Make metadata.jsonl, with these captions by name, the only place that captions are read from.

    Every other table and .txt goes: this is for a copy, never for the folder of a user."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in (".jsonl", ".csv", ".txt") and path.is_file():
            path.unlink()
    rows = [{"file_name": name, "text": " ".join(text.split())} for name, text in captions.items()]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def text_beside(folder: Path, picture: Path) -> str:
    """What the .txt of a picture's name says, on one line; "" without one.

    ValueError for a link to the outside, and for what is no text."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path.name} is a link that leads outside the folder")
    return clean_caption(_read_text(path), path.name)


def caption_in(meta: dict[str, Any]) -> str:
    """The caption under one of CAPTION_COLUMNS in the JSON of a sample, on one line; "" where there is none."""
    told = (meta.get(column) for column in CAPTION_COLUMNS)
    text = next((text for text in told if isinstance(text, str) and text.strip()), "")
    return clean_caption(text, "the caption")


def clean_caption(text: str, what: str) -> str:
    """A caption on one line. ValueError, which begins with `what`, for what no prompt may be."""
    return " ".join(check_prompt(text, what).split())


def caption_for(name: str, choice: str) -> str:
    """The caption that a choice gives a picture without one; "" when it gives none."""
    if choice == "trigger":
        return TRIGGER
    if choice == "folder":
        parent = Path(name).parent.name
        return "" if parent in ("train", *SPLITS) else words_of_name(parent)
    return words_of_name(name) if choice == "name" else ""


def words_of_name(name: str) -> str:
    """A caption from a file name: "redApple_big-02.png" -> "red apple big"; '' when it has no words."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", Path(name).stem)
    words = re.sub(r"[\W_]+", " ", words).strip().lower()
    words = re.sub(r"( copy| \d+)+$|^\d+( \d+)*$", "", words).strip()
    return words if re.search(r"[^\W\d]", words) else ""


def unused(names: list[str], pictures: list[str], read: list[str]) -> list[tuple[str, str]]:
    """(name, reason) of the files among `names` that look like captions and are not read.

    read: the tables that are."""
    texts = {Path(picture).with_suffix(".txt").as_posix() for picture in pictures}
    beside = {Path(table).parent: Path(table).name for table in read}
    found = []
    for name in names:
        suffix, table = Path(name).suffix.lower(), beside.get(Path(name).parent)
        if suffix == ".txt" and name not in texts:
            found.append((name, "no picture has its name"))
        elif suffix in (".jsonl", ".csv") and name not in read:
            found.append((name, f"captions are read from {table or 'metadata.jsonl or metadata.csv'}"))
    return found


def held_out(names: list[str]) -> set[str]:
    """The pictures that an imagefolder keeps for judging: those in validation/ or test/ where train/ is too."""
    first = {name: name.lower().removeprefix("data/").split("/")[0] for name in names}
    return {name for name, part in first.items() if part in SPLITS} if "train" in first.values() else set()


def _table_files(folder: Path) -> list[Path]:
    at_root = sorted(folder.glob("*.csv"))
    named = [path for path in at_root if path.name == "metadata.csv"] or at_root
    if len(named) > 1 and not (folder / "metadata.jsonl").is_file():
        raise ValueError(f"{folder} has {len(named)} CSV files; name the one with the captions metadata.csv")
    deeper = [path for path in sorted(folder.rglob("metadata.csv")) if path.parent != folder]
    jsonl = [path for path in sorted(folder.rglob("metadata.jsonl")) if path.is_file()]
    covered = {path.parent for path in jsonl}
    return [*(path for path in (*named[:1], *deeper) if path.parent not in covered), *jsonl]


def _pair(folder: Path, path: Path, line: int, row: dict[str, Any]) -> tuple[str, str]:
    where = f"{path}, line {line}"
    name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
    if not isinstance(name, str):
        raise ValueError(f"{where}: no file_name; each row needs the name of its picture")
    caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
    if not isinstance(caption, str):
        raise ValueError(f"{where}: the caption must be text")
    inner = path.parent.relative_to(folder).as_posix()
    return plain_name(folder, name, where, inner), clean_caption(caption, f"{where}: the caption")


def plain_name(folder: Path, name: str, where: str, inner: str = ".") -> str:
    """A name, relative to the sub-folder `inner`, in its plain form. ValueError where it leads outside the folder."""
    plain = os.path.normpath(name.replace("\\", "/"))
    outside = plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or "\0" in plain
    plain = os.path.normpath(f"{inner}/{plain}")
    if outside or plain.startswith("..") or not (folder / plain).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name!r} leads outside the folder; name pictures that lie in it")
    return Path(plain).as_posix()


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}; save it as a plain CSV") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
