"""What a shard holds: told by the headers of its tar, or faster by the parquet and stats beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def tar_members(path: Path) -> tuple[list[tuple[str, int, int]], str]:
    """The regular files of a tar as (name, offset of its data, size), and what is wrong, '' if nothing.

    All before the first fault are listed. Only headers are read (POSIX ustar, GNU long names, pax paths)."""
    members: list[tuple[str, int, int]] = []
    at, long_name = 0, ""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            handle = file.fileno()
            while True:
                header = os.pread(handle, 512, at)
                if len(header) < 512:
                    return members, "truncated: no end-of-archive mark" if end else "empty file"
                if not any(header):
                    return members, ""
                name, kind, size = _header(header)
                data = at + 512
                if data + size > end:
                    return members, f"truncated in {long_name or name}"
                if kind in b"Lx":
                    long_name = _long_name(kind, os.pread(handle, min(size, 2**16), data)) or long_name
                elif kind != b"g":
                    if kind in b"0\0":
                        members.append((long_name or name, data, size))
                    long_name = ""
                at = data + (size + 511) // 512 * 512
    except (OSError, ValueError) as error:
        return members, f"unreadable at byte {at}: {error}"


def manifest(shard: Path, columns: Sequence[str]) -> dict[str, list[Any]] | None:
    """Columns of a shard's parquet, "key" among them, of the samples in its tar and in their order.

    None unless parquet, stats and the size of the tar agree, as ShardWriter leaves them: the headers tell then.
    A column that the parquet does not have is all None."""
    import pyarrow
    import pyarrow.parquet

    beside = shard.with_suffix(".parquet")
    try:
        stats = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text(encoding="utf-8"))
        if stats["tar_bytes"] != shard.stat().st_size:
            return None
        with pyarrow.parquet.ParquetFile(beside) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            table = file.read([*{"key", "status", *known}]).to_pydict()
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None
    kept = [row for row, status in enumerate(table["status"]) if status == "success"]
    if len(kept) != stats.get("successes"):
        return None
    empty = [None] * len(table["key"])
    return {name: [table.get(name, empty)[row] for row in kept] for name in {"key", *columns}}


def _header(block: bytes) -> tuple[str, bytes, int]:
    """(name, type, size) of a tar header block. ValueError when its checksum does not hold."""
    checksum = block[148:156].split(b"\0")[0].strip()
    if not checksum.isdigit() or int(checksum, 8) != sum(block) - sum(block[148:156]) + 256:
        raise ValueError("not a tar header (is it a plain, uncompressed tar?)")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0")[0] + b"/" + name
    if block[124] & 128:
        size = int.from_bytes(block[125:136], "big")
    else:
        size = int(block[124:136].split(b"\0")[0].strip() or b"0", 8)
    return name.decode("utf-8", "replace"), block[156:157], size


def _long_name(kind: bytes, data: bytes) -> str:
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "replace")
    while data:
        length = int(data.split(b" ", 1)[0])
        if length < 5:
            raise ValueError("broken pax header")
        record, data = data[:length], data[length:]
        word, _, value = record.split(b" ", 1)[1].partition(b"=")
        if word == b"path":
            return value.rstrip(b"\n").decode("utf-8", "replace")
    return ""
