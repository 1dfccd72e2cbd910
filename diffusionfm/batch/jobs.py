"""Rows become jobs, one a picture, with every setting resolved; jobs become groups that share a network call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusionfm.batch.readers import Row
from diffusionfm.batch.rows import Rows, digest64, file_stem
from diffusionfm.checks import check_prompt, check_seed, check_settings

SETTINGS = ("negative_prompt", "steps", "guidance", "width", "height")
WINDOW = 4096  # jobs looked through for companions of equal shape
Shape = tuple[int, float, int, int]  # steps, guidance, width, height


@dataclass(frozen=True)
class Job:
    """One picture to make: row `id`, its `repeat`-th picture, with every setting resolved."""

    id: str
    repeat: int
    prompt: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def shape(self) -> Shape:
        """Jobs of one shape can share a network call."""
        s = self.settings
        return s["steps"], s["guidance"], s["width"], s["height"]

    @property
    def stem(self) -> str:
        """The name of the picture's file, less its suffix."""
        return file_stem(self.id, self.repeat)

    @property
    def key(self) -> int:
        """64 bits that stand for (id, repeat)."""
        return key_of(self.id, self.repeat)


@dataclass(frozen=True)
class Run:
    """What a run draws: the settings of rows that say nothing else, and all that its pictures have in common.

    settings: SETTINGS by name. output: how a picture is written (see `Finish`), and where to. made_by: the model's name
    and hash, the LoRAs and theirs. only: ids of the rows wanted, () for all. check: of steps, guidance and size, raises
    ValueError for what the model cannot draw.
    """

    seed: int
    settings: dict[str, Any]
    output: dict[str, Any]
    made_by: dict[str, Any]
    repeats: int = 1
    only: frozenset[str] = frozenset()
    check: Callable[..., Any] = check_settings

    def jobs(self, rows: Rows) -> Iterator[Job]:
        """The jobs of all rows, the pictures of a row one after the other."""
        for row in rows:
            if not self.only or row.id in self.only:
                for repeat in range(self.repeats):
                    yield self.job(row, repeat, rows)

    def job(self, row: Row, repeat: int, rows: Rows) -> Job:
        """The job of a row's `repeat`-th picture; what is wrong with the row is kept in `error`."""
        settings = {k: self.settings[k] if getattr(row, k) is None else getattr(row, k) for k in SETTINGS}
        seed = seed_of(self.seed, row.id, repeat) if row.seed is None else row.seed
        prompt, error = row.prompt, row.error
        if error is None:
            try:
                check_prompt(prompt)
                prompt = check_prompt(rows.wildcards.fill(prompt, f"{self.seed} {row.id} {repeat}"))
                check_prompt(settings["negative_prompt"], "negative_prompt")
                self.check(**{name: settings[name] for name in SETTINGS[1:]})
                settings["guidance"] = float(settings["guidance"])
                seed = check_seed(seed, repeat + 1) + (repeat if row.seed is not None else 0)
            except ValueError as problem:
                error = str(problem)
        return Job(row.id, repeat, prompt, seed, settings, error)

    def content(self, job: Job) -> int:
        """64 bits that stand for all that a picture is made of."""
        return content_of(job.prompt, job.seed, job.settings, self.output, self.made_by)


def seed_of(run_seed: int, row_id: str, repeat: int) -> int:
    """The seed, below 2**48, of a picture whose row names none: a hash of (run seed, row id, repeat)."""
    text = json.dumps([run_seed, row_id, repeat]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


def key_of(row_id: str, repeat: int) -> int:
    """64 bits that stand for a picture's name."""
    return digest64(f"{repeat} {row_id}")


def content_of(*parts: Any) -> int:
    """64 bits that stand for values of JSON."""
    return digest64(json.dumps(parts, sort_keys=True))


def groups(jobs: Iterable[Job], size: Callable[[Shape], int], window: int = WINDOW) -> Iterator[list[Job]]:
    """Jobs in groups that share a network call, at most size(shape) each, out of `window` at a time.

    A broken job comes alone and at once. When the window is full without a full group, the largest goes.
    """
    waiting: dict[Shape, list[Job]] = {}
    count = 0
    for job in jobs:
        if job.error:
            yield [job]
            continue
        group = waiting.setdefault(job.shape, [])
        group.append(job)
        count += 1
        shape: Shape | None = job.shape
        if len(group) < size(job.shape):
            shape = max(waiting, key=lambda shape: len(waiting[shape])) if count >= window else None
        if shape is not None:
            ready = waiting.pop(shape)
            count -= len(ready)
            yield from _cut(ready, size(shape))
    for shape, group in waiting.items():
        yield from _cut(group, size(shape))


def _cut(group: list[Job], at_once: int) -> Iterator[list[Job]]:
    """A group in parts of `at_once`, which may have shrunk since it was begun."""
    return (group[k : k + at_once] for k in range(0, len(group), at_once))
