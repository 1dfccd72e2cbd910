"""The rows of a batch as a stream, each with an id that names it for good: a million of them take no room."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from diffusionfm.batch.phrases import Wildcards
from diffusionfm.batch.readers import Numbered, Row, digest, parse, read_file, read_text, spooled_stdin

Source = str | os.PathLike[str] | Iterable[Row | Mapping[str, Any] | str]


class Rows:
    """The rows of a source, read through once to be counted and checked, then streamed as often as wanted.

    source: a file (.jsonl, .csv, .tsv, .parquet, or .txt with a prompt and its flags a line), "-" for JSON or plain
        lines on standard input, or dicts and prompts. An iterator is held as a list; all else is read anew each time.
    A row of a prompt matrix becomes a row a prompt: ID-1, ID-2, ... where it has an id. A row without an id gets one
    made of its words and settings, so that rows may be reordered. A broken row comes back with `error` set.
    Kept are 8 bytes a row. ValueError when there is no row, or more than `most`, a column is unknown, a file is not
    UTF-8, or two rows share an id (letter case aside: pictures are named after ids).
    """

    def __init__(self, source: Source, wildcards: Wildcards | None = None, most: int | None = None):
        self.wildcards = wildcards or Wildcards()
        self.source = list(source) if isinstance(source, Iterator) else source
        self.stdin = (
            spooled_stdin() if isinstance(source, (str, os.PathLike)) and str(source) == "-" else None
        )
        self._count = 0
        self._repeated: set[int] = set()  # of ids made of content, those that rows share
        self._check(most)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        copies = dict.fromkeys(self._repeated, 0)
        for _, row in self._read():
            if row.id:
                yield row
                continue
            name = _content_id(row)
            key = digest64(name)
            if key in copies:
                copies[key] += 1
                name = name if copies[key] == 1 else f"{name}-{copies[key]}"
            yield replace(row, id=name)

    def _read(self) -> Numbered:
        """Rows as they stand in the source, matrices expanded, ids still missing where none was given."""
        for number, row in self._source():
            try:
                prompts = (
                    self.wildcards.expand(row.prompt) if isinstance(row.prompt, str) else iter([row.prompt])
                )
            except ValueError as error:
                row, prompts = replace(row, error=row.error or str(error)), iter([row.prompt])
            first, second = next(prompts), next(prompts, None)
            if second is None:
                yield number, replace(row, prompt=first)
                continue
            for k, prompt in enumerate(chain((first, second), prompts), 1):
                yield number, replace(row, prompt=prompt, id=f"{row.id}-{k}" if row.id else "")

    def _source(self) -> Numbered:
        if self.stdin is not None:
            self.stdin.seek(0)
            yield from read_text(self.stdin, "-", "standard input")
        elif isinstance(self.source, (str, os.PathLike)):
            yield from read_file(Path(self.source))
        else:
            yield from ((n, parse(value, f"row {n}")) for n, value in enumerate(self.source, 1))

    def _check(self, most: int | None) -> None:
        import numpy as np

        given, made = array("Q"), array("Q")
        for _, row in self._read():
            self._count += 1
            if most is not None and self._count > most:
                raise ValueError(f"more than {most:,} rows, {{a|b}} counted as two: give at most {most:,}")
            if row.id:
                given.append(digest64(row.id.casefold()))
            else:
                made.append(digest64(_content_id(row)))
        if not self._count:
            name = self.source if isinstance(self.source, (str, os.PathLike)) else "the list of rows"
            raise ValueError(f"{name} holds no prompt: write at least one row")
        ids, times = np.unique(np.frombuffer(made, np.uint64), return_counts=True)
        self._repeated = set(ids[times > 1].tolist())
        known, times = np.unique(np.frombuffer(given, np.uint64), return_counts=True)
        twice = set(known[times > 1].tolist()) | set(np.intersect1d(known, ids).tolist())
        if twice:
            self._refuse(twice)
        if self._repeated and len(
            known
        ):  # a second "fox-1a2b" is named "fox-1a2b-2": did somebody write that?
            names = np.fromiter((digest64(row.id.casefold()) for row in self), np.uint64, self._count)
            names, times = np.unique(names, return_counts=True)
            if (times > 1).any():
                self._refuse(set(names[times > 1].tolist()))

    def _refuse(self, digests: set[int]) -> None:
        """Name two of the rows whose ids have these digests."""
        first: dict[int, int] = {}
        for (number, _), row in zip(self._read(), self, strict=True):
            key = digest64(row.id.casefold())
            if key in digests and first.setdefault(key, number) != number:
                raise ValueError(
                    f"rows {first[key]} and {number} have the same id {row.id!r}: give each row its own"
                )
        raise ValueError("two prompts of one row's matrix have the same id: give that row another id")


def digest64(text: str) -> int:
    """64 bits that stand for a text; two of a million differ but for a chance of one in 30 million."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def file_stem(row_id: str, repeat: int) -> str:
    """A safe file name for picture `repeat` of a row; no two (id, repeat) share one."""
    name = row_id
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", row_id):
        name = f"{_slug(row_id)}+{digest(row_id, 20)}"  # two of a million are equal once in 10**12 batches
    return name if repeat == 0 else f"{name}~{repeat}"


def _content_id(row: Row) -> str:
    fields = (row.prompt, row.negative_prompt, row.seed, row.steps, row.guidance, row.width, row.height)
    content = json.dumps(fields, default=str)
    return f"{_slug(str(row.prompt))}-{digest(content)}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text[:200].lower()).strip("-")[:40].strip("-") or "row"
