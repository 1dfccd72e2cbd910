"""A look at a batch from outside, while it draws or afterwards: how many, the latest pictures, what failed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionfm.batch.manifest import MANIFEST


@dataclass(frozen=True)
class Look:
    """What a batch's folder shows. done, failed: pictures on record. latest, problems: the last records of each."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    latest: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)


def look(out: Path, most: int = 12) -> Look:
    """What the manifest in `out` tells, at most `most` records of each kind; seconds: of drawing, all pictures'."""
    done, failed, seconds = 0, 0, 0.0
    latest: deque[dict[str, Any]] = deque(maxlen=most)
    problems: deque[dict[str, Any]] = deque(maxlen=most)
    for record in _records(out):
        ok = record["status"] == "ok"
        done, failed = done + ok, failed + (not ok)
        seconds += record.get("seconds", 0.0)
        (latest if ok else problems).append(record)
    return Look(done, failed, seconds, [*latest][::-1], [*problems][::-1])


def _records(out: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the manifest, which may be growing."""
    if not (out / MANIFEST).is_file():
        return
    with (out / MANIFEST).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
