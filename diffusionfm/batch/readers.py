"""Rows as people have them: txt with line flags, CSV, TSV, JSONL, Parquet and standard input, read as a stream."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

from diffusionfm.batch.phrases import parse_line
from diffusionfm.checks import is_unicode

FIELDS = ("id", "prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")
FORMATS = (".jsonl", ".csv", ".tsv", ".txt", ".parquet")
ID_LENGTH = 1000
_WHOLE = ("seed", "steps", "width", "height")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what to draw, and the settings that differ from the run's (None: the run's)."""

    id: str
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None  # why this row cannot be drawn; it is recorded as failed


Numbered = Iterator[tuple[int, Row]]  # rows with the number of the line, or of the record, where each stands


def read_file(path: Path) -> Numbered:
    """The rows of a file in the format that its name tells. ValueError for what is wrong with the file as a whole."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(
            f"cannot tell the format of {path.name}: name it {', '.join('*' + f for f in FORMATS)}"
        )
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open("rb") as file:
        yield from read_text(file, kind, str(path))


def read_text(file: IO[bytes], kind: str, name: str) -> Numbered:
    """The rows of an open file of UTF-8 text, which stays open; kind: a suffix, or "-" for JSON or plain lines."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        if kind in (".csv", ".tsv"):
            yield from _read_table(text, "\t" if kind == ".tsv" else ",", name)
            return
        for number, line in enumerate(text, 1):
            line = line.strip()
            if line and (kind == ".jsonl" or kind == "-" and re.match(r'\{\s*"', line)):
                yield number, _parse_json(line, number)
            elif line:
                yield number, _parse_flags(line, number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    finally:
        text.detach()


def spooled_stdin() -> IO[bytes]:
    """Standard input read to its end into a temporary file, so that it can be counted before it is drawn."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as its rows are read)
    shutil.copyfileobj(sys.stdin.buffer, file)
    return file


def parse(value: Any, name: str) -> Row:
    """The row of a dict, of a prompt or of a Row; `error` says what is wrong with it. name: as it is called there."""
    if isinstance(value, Row):
        return value if _can_name(value.id) else _nameless(name)
    if isinstance(value, str):
        return Row("", value)
    if not isinstance(value, Mapping):
        return _broken(None, name, f"{name} must be an object with a prompt, got {type(value).__name__}")
    unknown = [str(key) for key in value if key not in FIELDS]
    if unknown:
        return _broken(value.get("id"), name, _unknown("field", unknown[0]))
    fields = {key: item for key, item in value.items() if item is not None}
    try:
        for key in _WHOLE:
            if key in fields and isinstance(fields[key], str):
                fields[key] = _number(key, fields[key], int)
        if isinstance(fields.get("guidance"), str):
            fields["guidance"] = _number("guidance", fields["guidance"], float)
        elif isinstance(fields.get("guidance"), int) and not isinstance(fields["guidance"], bool):
            fields["guidance"] = float(fields["guidance"])
    except ValueError as error:
        return _broken(value.get("id"), name, str(error))
    row_id = fields.pop("id", "")
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if not _can_name(row_id):
        return _nameless(name)
    return Row(row_id, **{"prompt": "", **fields})


# ------------------------------------------------------------------ formats


def _read_table(file: Iterable[str], delimiter: str, name: str) -> Numbered:
    csv.field_size_limit(2**27)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        columns = list(reader.fieldnames or [])
        _check_columns(columns, name)
        for record in reader:
            number, line = reader.line_num, f"line {reader.line_num}"
            if None in record or None in record.values():
                yield number, _broken(record.get("id"), line, f"{line} does not have {len(columns)} fields")
            else:
                yield number, parse({key: item for key, item in record.items() if item != ""}, line)
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}: check its quotes") from error


def _read_parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield (
                        number,
                        parse({key: _plain(key, item) for key, item in record.items()}, f"row {number}"),
                    )
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}): write it again") from error


def _plain(key: str, value: Any) -> Any:
    """A cell as JSON would have it: pandas writes whole numbers beside missing ones as floats and NaN."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(value) if key in _WHOLE and isinstance(value, float) and value.is_integer() else value


def _check_columns(columns: list[str], name: str) -> None:
    for column in columns:
        if column not in FIELDS:
            raise ValueError(f"{name}: {_unknown('column', column)}")
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has no column named prompt: add one (a CSV or TSV names its columns in the first line)"
        )


def _parse_json(line: str, number: int) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _broken(None, f"line {number}", f"line {number} is not JSON: {error}")
    return parse(value, f"line {number}")


def _parse_flags(line: str, number: int) -> Row:
    try:
        return parse(parse_line(line), f"line {number}")
    except ValueError as error:
        return _broken(None, f"line {number}", str(error))


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text.strip())
    except ValueError as error:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"{key} must be a {what}, got {text[:50]!r}") from error


def _unknown(what: str, name: str) -> str:
    near = get_close_matches(name, FIELDS, 1)
    return (
        f"unknown {what} {name[:50]!r}: {f'did you mean {near[0]}?' if near else 'use ' + ', '.join(FIELDS)}"
    )


def _can_name(row_id: Any) -> bool:
    return isinstance(row_id, str) and len(row_id) <= ID_LENGTH and is_unicode(row_id)


def _nameless(name: str) -> Row:
    return _broken(None, name, f"{name}: an id must be text in Unicode, of {ID_LENGTH} characters or fewer")


def _broken(row_id: Any, name: str, error: str) -> Row:
    """A row that cannot be read. One without an id gets one of its place and error, which no other row will have."""
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if not row_id or not _can_name(row_id):
        row_id = f"{name.replace(' ', '-')}-{digest(error)}"
    return Row(row_id, error=error)


def digest(text: str, digits: int = 10) -> str:
    """Hex digits that stand for a text, for ids and names of files."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
