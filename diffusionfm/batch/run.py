"""One batch from its rows to its report: plan, draw, write, record; stopped anyhow, it goes on when run again."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffusionfm.batch.advice import Advice
from diffusionfm.batch.draw import WORDS, Drawer, Drawn, draw_all, encode, kernels
from diffusionfm.batch.jobs import Job, Run, groups
from diffusionfm.batch.manifest import FAILED, OK, Manifest, locked
from diffusionfm.batch.options import Options
from diffusionfm.batch.plan import Plan
from diffusionfm.batch.report import Summary, sheets_are_old, write_sheets
from diffusionfm.batch.rows import Rows, Source
from diffusionfm.batch.stores import Sample, open_store
from diffusionfm.phrasebook import quoted

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

AHEAD = 2  # groups drawn but not yet on disk
TOLD = 1000  # characters of a failed row's prompt that its record repeats


def generate_batch(
    rows: Source | Rows,
    pipe: DiffusionFMPipeline,
    out_dir: str | os.PathLike[str],
    options: Options | None = None,
    *,
    load_seconds: float | None = None,
    progress: bool = True,
    **more: Any,
) -> Summary:
    """Make the pictures of every row in `out_dir`, a manifest line each; a bad row is a failed line.

    rows: a file, "-", or dicts and prompts, see `Rows`. options: or the fields of `Options` one by one. load_seconds:
    what loading the model took, for the report. Raises ValueError before any work for bad options and for rows that
    clash with the manifest already there, and OSError when the folder cannot be written or the device draws no more.
    """
    batch = Batch(rows, pipe, Path(out_dir), _options(options, more))
    batch.out.mkdir(parents=True, exist_ok=True)
    with locked(batch.out):
        return batch.go(load_seconds, progress)


def plan_batch(
    rows: Source | Rows,
    pipe: DiffusionFMPipeline,
    out_dir: str | os.PathLike[str],
    options: Options | None = None,
    **more: Any,
) -> Plan:
    """What `generate_batch` would do, and how long, by a trial of the commonest shape; writes nothing."""
    batch = Batch(rows, pipe, Path(out_dir), _options(options, more))
    plan = Plan(len(batch.rows), advice=batch.advice)
    for job, state in batch.jobs():
        plan.count(job, state)
    with _threads_of_a_worker(batch.options):
        plan.estimate(batch.drawer, batch.processes)
    return plan


def _options(options: Options | None, more: dict[str, Any]) -> Options:
    """All of them as one object, or one by one; TypeError for both, which would leave some out."""
    if options is not None and more:
        raise TypeError(f"give options, or {', '.join(more)} by keyword, not both")
    return options or Options(**more)


@contextmanager
def _threads_of_a_worker(options: Options) -> Iterator[None]:
    """As many threads as one of Ray's workers has, which is one, where they draw."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(1 if options.engine == "ray" else own)
    try:
        yield
    finally:
        torch.set_num_threads(own)


class Batch:
    """A run on its folder: the main thread draws while another encodes, writes and records."""

    def __init__(self, rows: Source | Rows, pipe: DiffusionFMPipeline, out: Path, options: Options):
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file: --out must name a folder")
        self.pipe = pipe
        self.out = out
        self.options = options
        self.finish = options.finish
        self.run = options.run(pipe)
        self.rows = rows if isinstance(rows, Rows) else Rows(rows, options.wildcards)
        self.processes, sharing = options.processes(pipe)
        self.drawer = Drawer(pipe, 1 if options.deterministic else options.batch_size, sharing)
        self.store = open_store(options.to, out, self.finish.suffix, options.samples_per_shard)
        self.advice = Advice()
        self.summary = Summary(advice=self.advice)
        self.broken = False

    def jobs(self) -> Iterator[tuple[Job, int | None]]:
        """Every job with the state of its record, once each was held against the manifest and before any is drawn.

        ValueError for a finished picture that is now asked for otherwise, and for an id in `only` that no row has."""
        self.manifest = Manifest(self.out, self.store.has, self.options.to)
        missing = set(self.run.only)
        unread = lru_cache(WORDS)(partial(self.pipe.unread, loras=self.pipe.loras))
        for job in self.run.jobs(self.rows):
            missing.discard(job.id)
            if not job.error:
                self.advice.count(job, unread)
            yield job, self.manifest.admit(job, self.run, self.options.retry_failed)
        if missing:
            raise ValueError(
                f"no row has the id {min(missing)!r}: the manifest of the whole batch tells the ids"
            )
        if self.options.retry_failed and not self.run.only:
            self.manifest.forget()

    def go(self, load_seconds: float | None, progress: bool) -> Summary:
        """Do what is to be done, and write the report, also when it is interrupted."""
        start, summary, total = time.monotonic(), self.summary, 0
        summary.load_seconds = load_seconds
        for _, state in self.jobs():
            total += 1
            summary.skipped += state == OK
            summary.failed += state == FAILED
        self.manifest.compact()
        self.store.resume(self.manifest.in_file)
        off = None if progress else True
        try:
            with (
                kernels(self.options.deterministic),
                self.manifest.appending() as self.record,
                tqdm(
                    total=total, initial=summary.skipped + summary.failed, unit="img", disable=off
                ) as self.bar,
                ThreadPoolExecutor(1, "writer") as writer,
            ):
                self._draw(writer)
            self.store.close()
            if self.options.sheets and sheets_are_old(self.out):
                describe = self.pipe.describe if self.options.metadata else None
                write_sheets(self.out, self.manifest.records(), self.options.sheets, describe)
        finally:
            summary.seconds = time.monotonic() - start
            summary.write(self.out, self.manifest.failures)
        return summary

    def _draw(self, writer: ThreadPoolExecutor) -> None:
        how = self.options.recipe(self.pipe, self.run)
        todo = (job for job in self.run.jobs(self.rows) if self.manifest.state(job) is None)
        pending: deque[Future[None]] = deque()
        for drawn in draw_all(self.drawer, groups(todo, self.drawer.size), how, self.options.workers):
            pending.append(writer.submit(self._keep, drawn))
            while len(pending) > AHEAD or (pending and pending[0].done()):
                pending.popleft().result()
        for future in pending:
            future.result()

    def _keep(self, drawn: list[Drawn]) -> None:
        """Encode, write, sync, and only then record. After an error nothing more is written."""
        if self.broken:
            return
        self.broken = True
        done = [encode(one, self.finish, self.options.metadata) for one in drawn]
        while done:
            room = self.store.room()
            part, done = done[:room], done[room:]
            samples = [self._sample(one) for one in part if one.error is None]
            places = iter(self.store.put(samples) if samples else [])
            records = [_record(one, self.run, next(places) if one.error is None else {}) for one in part]
            self.record(records)
            self._count(part)
        self.broken = False

    def _sample(self, drawn: Drawn) -> Sample:
        job, (width, height) = drawn.job, drawn.size
        told = {"id": job.id, "repeat": job.repeat, "seed": job.seed, **job.settings, **self.run.made_by}
        if drawn.read is not None:
            told["read_as"] = drawn.read
        told |= {"width": width, "height": height, "sha256": hashlib.sha256(drawn.data).hexdigest()}
        return Sample(job.stem, self.finish.suffix, drawn.data, job.prompt, told)

    def _count(self, drawn: Iterable[Drawn]) -> None:
        for one in drawn:
            if one.error is None:
                if one.read is not None and not quoted(one.job.prompt):
                    self.summary.read(one.job.prompt, one.read)
                self.summary.made += 1
                self.summary.latencies.append(one.seconds)
            else:
                self.summary.failed += 1
                self.manifest.failures[str(one.kind)] += 1
            self.bar.update()


def _record(drawn: Drawn, run: Run, place: dict[str, str]) -> dict[str, Any]:
    job, done = drawn.job, drawn.error is None
    return {
        "id": job.id,
        "repeat": job.repeat,
        "prompt": job.prompt if done else _told(job.prompt),
        "read_as": drawn.read,
        "seed": job.seed if done else _told(job.seed),
        "status": "ok" if done else "failed",
        "error": drawn.error,
        "kind": drawn.kind,
        "file": None,
        **place,
        "sha256": hashlib.sha256(drawn.data).hexdigest() if done else None,
        "seconds": round(drawn.share, 4),
        "settings": job.settings if done else {name: _told(value) for name, value in job.settings.items()},
        "output": run.output,
        "made_by": run.made_by,
    }


def _told(value: Any) -> Any:
    """What a broken row says, as JSON of a bearable length."""
    sound = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if sound else str(value)[:TOLD]
