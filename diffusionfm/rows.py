"""The rows of a batch: read from txt, CSV, TSV or JSONL, each with an id that names it for good."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

FIELDS = ("id", "prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")
_WHOLE = ("seed", "steps", "width", "height")
FORMATS = (".jsonl", ".csv", ".tsv", ".txt")


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


def read_rows(source: str | os.PathLike[str] | Iterable[Row | Mapping[str, Any] | str]) -> list[Row]:
    """All rows of a file (.jsonl, .csv, .tsv, .txt with a prompt a line), or of dicts or prompts.

    A row without an id gets one made of its words and settings, so that rows may be reordered. A broken row
    comes back with `error` set. Raises ValueError when there is no row, a column is unknown, a file is not
    UTF-8, or two rows share an id (letter case aside: pictures are named after ids).
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    numbered: Iterator[tuple[int, Row]]
    if path is None:
        values = cast(Iterable[Any], source)
        numbered = ((n, _parse(value, f"row {n}")) for n, value in enumerate(values, 1))
    else:
        numbered = _read_file(path)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    copies: dict[str, int] = {}
    for number, row in numbered:
        if not row.id:
            name = _content_id(row)
            copies[name] = copies.get(name, 0) + 1
            row = _with_id(row, name if copies[name] == 1 else f"{name}-{copies[name]}")
        first = seen.setdefault(row.id.casefold(), number)
        if first != number:
            raise ValueError(f"rows {first} and {number} have the same id {row.id!r}: give each row its own")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path or 'the list of rows'} holds no prompt: write at least one row")
    return rows


def file_stem(row_id: str, repeat: int) -> str:
    """A safe file name for picture `repeat` of a row; no two (id, repeat) share one."""
    name = row_id
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", row_id):
        name = f"{_slug(row_id)}+{_digest(row_id)}"
    return name if repeat == 0 else f"{name}~{repeat}"


def _read_file(path: Path) -> Iterator[tuple[int, Row]]:
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"cannot tell the format of {path.name}: name it {', '.join('*' + f for f in FORMATS)}"
        )
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                yield from _read_table(file, "\t" if path.suffix.lower() == ".tsv" else ",", path)
                return
            for number, line in enumerate(file, 1):
                line = line.strip()
                if line:
                    yield (
                        number,
                        (_parse_json(line, number) if path.suffix.lower() == ".jsonl" else _parse(line, "")),
                    )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _read_table(file: Iterable[str], delimiter: str, path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**27)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        for column in columns:
            if column not in FIELDS:
                raise ValueError(f"{path}: {_unknown('column', column)}")
        if "prompt" not in columns:
            raise ValueError(f"{path} has no column named prompt: its first line must name the columns")
        for record in reader:
            name = f"line {reader.line_num}"
            if None in record or None in record.values():
                yield (
                    reader.line_num,
                    _broken(record.get("id"), name, f"{name} has not {len(columns)} fields"),
                )
            else:
                yield reader.line_num, _parse({k: v for k, v in record.items() if v != ""}, name)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}: check its quotes") from error


def _parse_json(line: str, number: int) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _broken(None, f"line {number}", f"line {number} is not JSON: {error}")
    return _parse(value, f"line {number}")


def _parse(value: Any, name: str) -> Row:
    if isinstance(value, Row):
        return value
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
    except ValueError as error:
        return _broken(value.get("id"), name, str(error))
    row_id = fields.pop("id", "")
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if not isinstance(row_id, str) or len(row_id) > 1000:
        return _broken(None, name, f"{name}: an id must be text of 1000 characters or fewer")
    return Row(row_id, **{"prompt": "", **fields})


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text.strip())
    except ValueError as error:
        raise ValueError(f"{key} must be a number, got {text!r}") from error


def _unknown(what: str, name: str) -> str:
    near = get_close_matches(name, FIELDS, 1)
    return f"unknown {what} {name!r}: {f'did you mean {near[0]}?' if near else 'use ' + ', '.join(FIELDS)}"


def _broken(row_id: Any, name: str, error: str) -> Row:
    known = isinstance(row_id, (str, int)) and not isinstance(row_id, bool) and 0 < len(str(row_id)) <= 1000
    return Row(str(row_id) if known else name.replace(" ", "-"), error=error)


def _with_id(row: Row, row_id: str) -> Row:
    return Row(row_id, *(getattr(row, key) for key in (*FIELDS[1:], "error")))


def _content_id(row: Row) -> str:
    content = json.dumps([getattr(row, key) for key in FIELDS[1:]], default=str)
    return f"{_slug(str(row.prompt))}-{_digest(content)}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text[:200].lower()).strip("-")[:40].strip("-") or "row"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
