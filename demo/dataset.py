"""Uploaded pictures as a folder of the run: taken in within limits, looked through, their captions edited."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusionfm.data.archive import WANTED, unpack
from diffusionfm.data.captions import replace_captions
from diffusionfm.data.folder import SUFFIXES, first_samples, scan
from diffusionfm.data.preflight import Preflight, preflight_sheet
from diffusionfm.images import save_png
from diffusionfm.serve.gate import SPARE

from .runs import Run

KINDS = [*sorted(WANTED), ".zip"]
"""Files that may be uploaded."""
MOST_PICTURES = 1000
MOST_TABLES = 100  # of captions, beside a .txt for every picture
MOST_BYTES = 512 * 2**20  # of an upload, all that is in its zips unpacked
SHEET = "preflight.png"
Rows = list[list[str]]


def pictures_of(run: Run) -> Path:
    """The run's folder of pictures."""
    folder = run.folder / "pictures"
    inside = list(folder.iterdir()) if folder.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def take_in(run: Run, files: Sequence[str]) -> None:
    """Copy what was uploaded into the run's folder, in place of what was there; zips are unpacked.

    ValueError for what is too much, or no picture: then all stays as it was.
    Pictures that are damaged or too large are told by `look_through`; nothing is decoded here."""
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".") as place:
        taken, before, folder = Path(place) / "taken", Path(place) / "before", run.folder / "pictures"
        taken.mkdir()
        _fill(taken, files)
        if folder.is_dir():
            folder.rename(before)
        taken.rename(folder)


def _fill(folder: Path, files: Sequence[str]) -> None:
    """Put uploaded files into an empty folder, all of them and all that is in zips within one limit."""
    zips = [Path(file) for file in files if Path(file).suffix.lower() == ".zip"]
    plain = [Path(file) for file in files if Path(file) not in zips]
    for path in plain:
        if path.suffix.lower() not in WANTED:
            raise ValueError(f"{path.name} is neither a picture nor captions: upload {', '.join(KINDS)}")
    left = min(MOST_BYTES, shutil.disk_usage(folder).free - SPARE) - _bytes(plain)
    if left < 0:
        raise ValueError(
            f"that is more than {MOST_BYTES // 2**20} MB, or than there is room for: upload less"
        )
    found = [Path(shutil.copyfile(path, _free(folder / path.name.lstrip(".")))) for path in plain]
    for path in zips:
        inner = _free(folder / path.stem.lstrip(".")) if plain or len(zips) > 1 else folder
        inner.mkdir(exist_ok=True)
        try:
            unpack(path, inner, left)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from error
        inside = [file for file in inner.rglob("*") if file.is_file()]
        left -= _bytes(inside)
        found += inside
        _check_count(found)
    if not _check_count(found):
        raise ValueError(
            f"no picture among these files: upload {', '.join(sorted(SUFFIXES))}, or a .zip of such"
        )


def _check_count(found: Sequence[Path]) -> int:
    """How many pictures there are; ValueError for too many of them, or of other files."""
    count = sum(path.suffix.lower() in SUFFIXES for path in found)
    if count > MOST_PICTURES:
        raise ValueError(
            f"{count:,} pictures: the studio takes {MOST_PICTURES:,}, `diffusionfm finetune` any number"
        )
    if len(found) > 2 * MOST_PICTURES + MOST_TABLES:
        raise ValueError(f"{len(found):,} files for {count:,} pictures: leave out what is no caption of them")
    return count


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def look_through(run: Run, size: int, missing: str) -> tuple[Preflight, Rows, Path | None]:
    """The report, a row (picture, caption) of each usable one, and the file of a contact sheet."""
    folder = pictures_of(run)
    report, found = scan(folder, size, missing)
    report.folder = str(run.facts["name"])
    sheet = None
    if found:
        sheet = run.folder / SHEET
        save_png(preflight_sheet(first_samples(found, size)), sheet)
    return report, [[picture.name, picture.caption] for picture in found], sheet


def settle(run: Run, rows: Rows, missing: str) -> None:
    """Make the table's captions those that are trained on. ValueError, naming pictures, when some have none."""
    captions = {str(name): str(text or "").strip() for name, text in rows if name}
    empty = [name for name, text in captions.items() if not text]
    if empty and missing != "skip":
        some = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise ValueError(
            f"no caption: {some}. Write it in the table, or choose what to do about such pictures"
        )
    if len(empty) == len(captions):
        raise ValueError("no picture has a caption: write some in the table")
    folder = pictures_of(run)
    known = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    replace_captions(folder, {name: text for name, text in captions.items() if name in known})


def _free(path: Path) -> Path:
    """The path, or the next of its name that is free."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem} {number}{path.suffix}")
    return found
