"""Scripted generation: rows in, pictures and a manifest out, each picture exactly once.

A picture is written to a temporary file, synced and renamed; then its line is added to DIR/manifest.jsonl.
Running the same command again goes on where the last run was stopped, however it was stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffusionfm import __version__
from diffusionfm.checks import check_prompt, check_seed, check_settings
from diffusionfm.images import encode_png, sync_folder, write_atomic
from diffusionfm.rows import Row, file_stem, read_rows

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

MANIFEST = "manifest.jsonl"
LOCK = ".lock"
SETTINGS = ("negative_prompt", "steps", "guidance", "width", "height")


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
    def key(self) -> tuple[str, int]:
        return self.id, self.repeat

    @property
    def shape(self) -> tuple[Any, ...]:
        """Jobs of one shape can share a network call."""
        return tuple(self.settings[name] for name in ("steps", "guidance", "width", "height"))

    @property
    def file(self) -> str:
        return file_stem(self.id, self.repeat) + ".png"


@dataclass
class Summary:
    """What a run did: pictures made now, found finished, failed (in the whole manifest), and its seconds."""

    made: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0


def seed_of(run_seed: int, row_id: str, repeat: int) -> int:
    """The seed, below 2**48, of a picture whose row names none: a hash of (run seed, row id, repeat)."""
    text = json.dumps([run_seed, row_id, repeat]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


def generate_batch(
    rows: str | os.PathLike[str] | Iterable[Row | Mapping[str, Any] | str],
    pipe: DiffusionFMPipeline,
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    repeats: int = 1,
    batch_size: int = 8,
    metadata: bool = True,
    retry_failed: bool = False,
    progress: bool = True,
) -> Summary:
    """Make `repeats` pictures of every row in `out_dir`, a manifest line each; a bad row is a failed line.

    A row's own columns override the arguments. A row without a seed takes one from (seed, id, repeat);
    with one, repeat k uses seed + k. So no seed depends on row order, batch size or restarts.
    Raises ValueError before any work for bad arguments or rows that clash with the manifest already there,
    and OSError when the folder cannot be written.
    """
    check_settings(steps=steps, guidance=guidance, height=height, width=width, num_images=repeats)
    check_settings(num_images=batch_size)
    check_seed(seed, repeats)
    run: dict[str, Any] = {"steps": steps, "guidance": guidance, "width": width, "height": height}
    run = {k: pipe.defaults[k] if v is None else v for k, v in run.items()}
    run["negative_prompt"] = check_prompt(negative_prompt, "negative_prompt")
    jobs = [plan(row, k, seed, run) for row in read_rows(rows) for k in range(repeats)]
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must name a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        return _run(jobs, pipe, out, batch_size, metadata, retry_failed, progress)


def plan(row: Row, repeat: int, run_seed: int, run: Mapping[str, Any]) -> Job:
    """The job of a row's `repeat`-th picture; what is wrong with the row is kept in `error`."""
    settings = {name: run[name] if getattr(row, name) is None else getattr(row, name) for name in SETTINGS}
    seed = seed_of(run_seed, row.id, repeat) if row.seed is None else row.seed
    error = row.error
    if error is None:
        try:
            check_prompt(row.prompt)
            check_prompt(settings["negative_prompt"], "negative_prompt")
            check_settings(**{name: settings[name] for name in SETTINGS[1:]})
            seed = check_seed(seed, repeat + 1) + (repeat if row.seed is not None else 0)
        except ValueError as problem:
            error = str(problem)
    return Job(row.id, repeat, row.prompt, seed, settings, error)


def _run(
    jobs: list[Job],
    pipe: DiffusionFMPipeline,
    out: Path,
    batch_size: int,
    metadata: bool,
    retry: bool,
    progress: bool,
) -> Summary:
    start, model = time.monotonic(), pipe.model_name
    for job in jobs:
        job.settings["model"] = model
    records = _open_manifest(out, jobs, retry)
    todo = [job for job in jobs if job.key not in records]
    summary = Summary(skipped=len(jobs) - len(todo))
    summary.failed = sum(records[job.key]["status"] == "failed" for job in jobs if job.key in records)
    with (
        (out / MANIFEST).open("ab") as manifest,
        tqdm(total=len(jobs), initial=summary.skipped, unit="img", disable=None if progress else True) as bar,
    ):
        for group in _groups(todo, batch_size):
            for record in _make(group, pipe, out, metadata):
                manifest.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
                manifest.flush()
                os.fsync(manifest.fileno())
                summary.made += record["status"] == "ok"
                summary.failed += record["status"] == "failed"
                bar.update()
    summary.seconds = time.monotonic() - start
    return summary


def _groups(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs in groups of at most `size` that share a network call; each broken job alone."""
    waiting: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        if job.error:
            yield [job]
            continue
        group = waiting.setdefault(job.shape, [])
        group.append(job)
        if len(group) == size:
            yield waiting.pop(job.shape)
    yield from waiting.values()


def _make(jobs: list[Job], pipe: DiffusionFMPipeline, out: Path, metadata: bool) -> Iterator[dict[str, Any]]:
    """Draw and write one group, give its manifest records; if it fails, try one picture at a time."""
    if jobs[0].error:
        yield _record(jobs[0], error=jobs[0].error)
        return
    first = jobs[0].settings
    try:
        images = pipe(
            [job.prompt for job in jobs],
            negative_prompt=[job.settings["negative_prompt"] for job in jobs],
            seed=[job.seed for job in jobs],
            num_inference_steps=first["steps"],
            guidance_scale=first["guidance"],
            width=first["width"],
            height=first["height"],
            batch_size=len(jobs),
        ).images
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if len(jobs) == 1:
            yield _record(jobs[0], error=" ".join(str(error).split())[:500])
            return
        for job in jobs:
            yield from _make([job], pipe, out, metadata)
        return
    for job, image in zip(jobs, images, strict=True):
        settings = {k: v for k, v in job.settings.items() if v not in (None, "")}
        parameters = {"prompt": job.prompt, "seed": job.seed, "version": __version__, **settings}
        data = encode_png(image, parameters if metadata else None)
        write_atomic(out / job.file, data)
        yield _record(job, sha256=hashlib.sha256(data).hexdigest())


def _record(job: Job, *, sha256: str | None = None, error: str | None = None) -> dict[str, Any]:
    done = error is None
    return {
        "id": job.id,
        "repeat": job.repeat,
        "prompt": job.prompt,
        "seed": job.seed,
        "status": "ok" if done else "failed",
        "error": error,
        "file": job.file if done else None,
        "sha256": sha256,
        "settings": job.settings,
    }


# ------------------------------------------------------------------ the manifest


def read_manifest(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a manifest; a last line without its newline was never finished and is left out."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records.append({**record, "id": str(record["id"]), "repeat": int(record["repeat"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged: restore it, or use a new --out folder"
            ) from error
    return records


def _open_manifest(out: Path, jobs: list[Job], retry: bool) -> dict[tuple[str, int], dict[str, Any]]:
    """Records that hold, by (id, repeat); others (torn, picture gone, to retry) are dropped."""
    path = out / MANIFEST
    for leftover in out.glob(".diffusionfm-*.tmp"):
        leftover.unlink()
    planned = {job.key: job for job in jobs}
    keep: dict[tuple[str, int], dict[str, Any]] = {}
    for record in read_manifest(path):
        key = record["id"], record["repeat"]
        job = planned.get(key)
        gone = record["status"] == "ok" and not (out / record["file"]).is_file()
        if gone or (record["status"] == "failed" and retry and job and not job.error):
            continue
        if job and record["status"] == "ok":
            _same(job, record, out)
        keep[key] = record
    text = b"".join(json.dumps(record, ensure_ascii=True).encode() + b"\n" for record in keep.values())
    if not path.exists() or path.read_bytes() != text:
        write_atomic(path, text)
    return keep


def _same(job: Job, record: dict[str, Any], out: Path) -> None:
    """Refuse to mix two runs in one folder: what is finished must be what is asked for now."""
    now = {"prompt": job.prompt, "seed": job.seed, **job.settings}
    then = {"prompt": record["prompt"], "seed": record["seed"], **record["settings"]}
    for name in now:
        if now[name] != then.get(name):
            raise ValueError(
                f"{out} already holds row {job.id!r} with {name} {then.get(name)!r}, now {now[name]!r}: "
                "run the same command as before to go on, or use a new --out folder"
            )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock file; a second process gets ValueError. A killed process frees it."""
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing to {out}: wait for it, or use another --out"
            ) from error
        yield
        sync_folder(out)
    finally:
        os.close(handle)
