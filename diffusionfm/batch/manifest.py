"""DIR/manifest.jsonl, the one record of what a batch has finished; in memory it takes 26 bytes a picture."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusionfm.batch.jobs import Job, Run, content_of, key_of
from diffusionfm.images import TEMPORARY, sync_folder
from diffusionfm.locks import locked as locked  # where a batch looks for it

MANIFEST = "manifest.jsonl"
MADE_OF = ("prompt", "seed", "settings", "output", "made_by")  # what two runs in one folder must agree on
OK, FAILED, DROPPED = 0, 1, 2  # what a record says; dropped: it holds no more, and will leave the file


class Manifest:
    """The records of a folder: which pictures are finished, which failed, and where new records go.

    has(file): whether the file of a finished picture is still there; a picture that is gone is drawn again. to: where
    the run's pictures go, None for one that adds none. A last line without its newline was never finished and counts
    for nothing. ValueError when another line is damaged, and when finished pictures went elsewhere.
    """

    def __init__(self, out: Path, has: Callable[[str], bool], to: str | None = None):
        self.path = out / MANIFEST
        self.failures: Counter[str] = Counter()  # by kind, of all that failed and was not taken up again
        self.in_file: Counter[str] = (
            Counter()
        )  # finished pictures by the file that holds them, where many share one
        self.size = 0  # bytes of whole lines
        keys, contents, states = array("Q"), array("Q"), array("B")
        for record in self.records():
            ok = record["status"] == "ok"
            if ok and to is not None:
                self._check_place(record, to)
            gone = ok and not has(record["file"])
            if record.get("member") and not gone:
                self.in_file[record["file"]] += 1
            if not ok:
                self.failures[record["kind"]] += 1
            keys.append(key_of(record["id"], record["repeat"]))
            contents.append(content_of(*(record[name] for name in MADE_OF)))
            states.append(DROPPED if gone else OK if ok else FAILED)
        self._sort(keys, contents, states)

    def _check_place(self, record: dict[str, Any], to: str) -> None:
        """Refuse a run whose pictures go elsewhere: it would look for those on record where they cannot be."""
        then = record["output"]["to"]
        if then != to:
            raise ValueError(
                f"{self.path.parent} already holds row {record['id']!r} with to {then!r}, now {to!r}: "
                f"go on with --to {then}, or use a new --out folder"
            )

    def _sort(self, keys: array[int], contents: array[int], states: array[int]) -> None:
        import numpy as np

        self.order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
        self.keys = np.frombuffer(keys, np.uint64)[self.order]
        self.contents = np.frombuffer(contents, np.uint64)
        self.states = np.frombuffer(states, np.uint8).copy()
        self.asked = np.zeros(len(states), bool)  # for by a row of this run

    def records(self) -> Iterator[dict[str, Any]]:
        """The records in the file, one after the other."""
        self.size = 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                self.size += len(line)
                try:
                    record = json.loads(line)
                    missing = {"id", "repeat", "status", "kind", "file", *MADE_OF} - record.keys()
                    if missing:
                        raise KeyError(*missing)
                except (ValueError, KeyError, AttributeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is damaged: restore it, or use a new --out folder"
                    ) from error
                yield record

    def place(self, key: int) -> int | None:
        """The line of a picture's record, from 0, if it has one that holds."""
        at = int(self.keys.searchsorted(self.keys.dtype.type(key)))
        if at == len(self.keys) or self.keys[at] != key:
            return None
        line = int(self.order[at])
        return None if self.states[line] == DROPPED else line

    def state(self, job: Job) -> int | None:
        """OK or FAILED for a job with a record that holds; None for one to do."""
        line = self.place(job.key)
        return None if line is None else int(self.states[line])

    def admit(self, job: Job, run: Run, retry: bool) -> int | None:
        """As `state`, once a run begins: what failed is dropped under `retry` unless its row is broken still.

        ValueError when the picture was finished with other settings than it is asked for now."""
        line = self.place(job.key)
        if line is None:
            return None
        self.asked[line] = True
        if self.states[line] == FAILED and retry and not job.error:
            self.states[line] = DROPPED
            return None
        if self.states[line] == OK and self.contents[line] != run.content(job):
            self._refuse(job, run)
        return int(self.states[line])

    def forget(self) -> None:
        """Drop the failures that no admitted job asks for: of rows that are gone, or have another id since mended."""
        self.states[(self.states == FAILED) & ~self.asked] = DROPPED

    def _refuse(self, job: Job, run: Run) -> None:
        """Say in what a finished picture differs from what is asked for now: two runs may not mix in one folder."""
        record = next(r for r in self.records() if (r["id"], r["repeat"]) == (job.id, job.repeat))
        now = {"prompt": job.prompt, "seed": job.seed, **job.settings, **run.output, **run.made_by}
        then = {name: record[name] for name in ("prompt", "seed")}
        then |= record["settings"] | record["output"] | record["made_by"]
        name = next((name for name in {**now, **then} if now.get(name) != then.get(name)), None)
        assert name is not None, "two digests of equal values"
        raise ValueError(
            f"{self.path.parent} already holds row {job.id!r} with {name} {then.get(name)!r}, "
            f"now {now.get(name)!r}: run the same command as before to go on, or use a new --out folder"
        )

    def compact(self) -> None:
        """Take dropped records, and half a last line, out of the file: whole or not at all."""
        if not self.path.exists():
            self.path.touch()
            sync_folder(self.path.parent)
        dropped = (self.states == DROPPED).nonzero()[0]
        if not len(dropped) and self.path.stat().st_size == self.size:
            return
        gone = set(dropped.tolist())
        self.failures = Counter()
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=TEMPORARY, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            for line, record in enumerate(self.records()):
                if line not in gone:
                    file.write(encode(record))
                    self.failures.update([record["kind"]] if record["status"] != "ok" else [])
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, self.path.stat().st_mode & 0o777)
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)

    @contextmanager
    def appending(self) -> Iterator[Callable[[Iterable[dict[str, Any]]], None]]:
        """A function that adds records and returns when they are on disk."""
        with self.path.open("ab") as file:

            def add(records: Iterable[dict[str, Any]]) -> None:
                file.write(b"".join(map(encode, records)))
                file.flush()
                os.fsync(file.fileno())

            yield add


def encode(record: dict[str, Any]) -> bytes:
    """A record's line."""
    return json.dumps(record, ensure_ascii=True, default=str).encode() + b"\n"
