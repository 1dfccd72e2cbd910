"""Picture shards -> shards of latents and text features, a shard at a time, by any number of workers.

A shard's bytes depend on it and the networks alone, so it does not matter who makes it, or how often it is tried.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from tqdm import tqdm

from diffusionfm import ray_jobs
from diffusionfm.checkpoint import replace_folder, write_json, write_weights
from diffusionfm.data.reader import BadSample, ShardDataset, tar_members
from diffusionfm.data.shards import ShardWriter, shard_paths
from diffusionfm.features import EMPTY_PROMPT
from diffusionfm.precompute.encoder import Encoder, EncoderConfig, load_encoder

LATENTS, MAKING = "latents", ".latents.{}.partial"  # below the run folder: the whole, and what is being made
READERS = 2  # threads that decode pictures while a batch is encoded
RECORD = "made_by"  # in a shard's stats: what it was made of; written last, so that a shard with one is whole


@dataclass(frozen=True)
class Job:
    """A picture shard to encode, and how many of its samples: the first `count`, or all (None)."""

    source: Path
    count: int | None


def precompute(
    shards: str | os.PathLike,
    run_dir: str | os.PathLike,
    cfg: EncoderConfig,
    *,
    limit: int = 0,
    engine: str = "local",
    workers: int = 0,
    overwrite: bool = False,
) -> Path:
    """Encode a folder of picture shards to RUN/latents/, a shard for a shard; returns the run folder.

    Shards that are whole stay as they are: after a kill, the same call goes on. They gather in a hidden folder that
    becomes RUN/latents/ when the last is there, so nobody trains on half of them.

    limit: take only the first so many pictures (0: all).
    engine: "local" works shards off one by one; under torchrun or accelerate launch each rank takes every world-th
        shard and never waits for another. "ray" lets `workers` Ray tasks (0: as many as fit) take them.
    overwrite: replace shards of other networks, another dtype or another source. Without it they are a ValueError.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f'engine is "local" or "ray", not {engine!r}')
    run = Path(run_dir)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if engine == "ray" and world > 1:
        raise ValueError(
            "engine=ray starts its own workers: run it once, without torchrun or accelerate launch"
        )
    jobs = plan(shard_paths(shards), limit)
    encoder = load_encoder(cfg if engine == "local" else replace(cfg, device="cpu"))
    making = run / MAKING.format(identity(jobs, encoder.made_by))
    todo = claim(making, jobs, slice(rank, None, world), encoder.made_by, overwrite)
    if todo is None:
        print(f"{run / LATENTS} is complete: made by autoencoder {encoder.made_by['vae']}", flush=True)
        return run
    print(f"rank {rank} of {world}: {len(todo)} of {len(jobs[rank::world])} shards to encode", flush=True)
    try:
        with tqdm(total=sum(map(pictures_of, todo)), unit="picture", disable=rank > 0) as bar:
            if engine == "ray":
                for done in encode_with_ray(cfg, todo, making, workers):
                    bar.update(done)
            else:
                for job in todo:
                    encode_shard(encoder, job, making, bar.update)
        count = publish(making, jobs, encoder)
    except OSError as error:
        raise ValueError(
            f"could not write {run} ({error}): free some disk space and run again; whole shards are kept"
        ) from error
    if count is None:
        print(f"rank {rank} of {world} is done; others are at work", flush=True)
    else:
        print(f"{run / LATENTS} is complete: {count} pictures", flush=True)
    return run


def claim(making: Path, jobs: Sequence[Job], mine: slice, made_by: dict, overwrite: bool) -> list[Job] | None:
    """Those of my jobs whose shards are not whole, or None when RUN/latents/ holds them all.

    ValueError when it, or an unfinished run here, was made of something else, unless `overwrite`.
    """
    run = making.parent
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        fault = find_fault(run / LATENTS, jobs, made_by) if (run / LATENTS).exists() else "nothing there"
        if not fault:
            return None
        others = [path for path in run.glob(MAKING.format("*")) if path != making]
        if (run / LATENTS).exists() or others:
            what = (
                f"{run / LATENTS} {fault}" if (run / LATENTS).exists() else f"{others[0]} was left unfinished"
            )
            if not overwrite:
                raise ValueError(
                    f"{what}, by other networks, settings or pictures: add overwrite=true to make it anew, or take "
                    "another trainer.output_dir"
                )
        making.mkdir(exist_ok=True)
        return [job for job in jobs[mine] if not (making / f"{job.source.stem}_stats.json").is_file()]


def find_fault(folder: Path, jobs: Sequence[Job], made_by: dict[str, Any]) -> str:
    """How a folder of shards differs from what the jobs of all ranks would make of it, in words; '' if it does not."""
    extra = {path.stem for path in folder.glob("*.tar")} - {job.source.stem for job in jobs}
    if extra:
        return f"holds {min(extra)}.tar, which the source lacks"
    for job in jobs:
        stats = folder / f"{job.source.stem}_stats.json"
        if not stats.is_file():
            return f"lacks {job.source.name}"
        found, wanted = json.loads(stats.read_text()).get(RECORD, {}), record(job, made_by)
        words = [
            f"{key} {found.get(key)}, now {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
        ]
        if words:
            return f"holds another {job.source.name} ({'; '.join(words)})"
    return ""


def identity(jobs: Sequence[Job], made_by: dict[str, Any]) -> str:
    """12 hex digits over networks, settings, and the names, sizes and dates of the sources: what may share a folder."""
    states = [(job.source.name, job.count, job.source.stat()) for job in jobs]
    told = [made_by, [(name, count, state.st_size, state.st_mtime_ns) for name, count, state in states]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def plan(sources: Sequence[Path], limit: int = 0) -> list[Job]:
    """The shards to encode, in order, so that they hold the first `limit` pictures; 0 for all of all."""
    if not limit:
        return [Job(source, None) for source in sources]
    jobs: list[Job] = []
    for source in sources:
        count = min(limit, pictures_of(Job(source, None)))
        jobs += [Job(source, count)] if count else []
        limit -= count
        if not limit:
            break
    return jobs


def pictures_of(job: Job) -> int:
    """How many pictures a job encodes: as many as there are by the headers of its shard, up to its count."""
    if job.count is not None:
        return job.count
    try:
        return len(readable(job.source))
    except NothingUsable:
        return 0


def record(job: Job, made_by: dict[str, Any]) -> dict[str, Any]:
    """What a shard is made of: networks, dtype, source by its digest, and how many of its samples."""
    return {**made_by, "source": source_digest(job.source), "count": job.count}


def source_digest(path: Path) -> str:
    """12 hex digits over the names and sizes of what a tar holds, its captions and its metadata.

    Pictures are not read: their SHA-256 lies in the metadata of every shard that this library writes.
    """
    members, trouble = tar_members(path)
    digest = hashlib.sha256(f"{path.stat().st_size} {trouble}".encode())
    with open(path, "rb") as file:
        for name, offset, size in members:
            digest.update(f"{name} {size}\n".encode())
            if name.endswith((".json", ".txt")):
                digest.update(os.pread(file.fileno(), size, offset))
    return digest.hexdigest()[:12]


class NothingUsable(ValueError):
    """A shard without a sample that can be encoded."""


def readable(source: Path) -> ShardDataset:
    """The samples of one shard; NothingUsable where it has none."""
    try:
        return ShardDataset([source])
    except ValueError as error:
        raise NothingUsable(str(error)) from error


def encode_shard(
    encoder: Encoder, job: Job, folder: Path, progress: Callable[[int], Any] = lambda count: None
) -> int:
    """Write folder/NAME.tar, NAME.parquet and NAME_stats.json, whole or not at all; gives how many samples it holds.

    Each sample is KEY.safetensors, KEY.txt and KEY.json, which names the networks. Samples that cannot be read are
    left out, and named in the parquet. A shard without any leaves its stats alone, which say so.
    """
    name, made_by = job.source.stem, record(job, encoder.made_by)
    # Each machine has its own: another may still be at work on a shard that is thought lost.
    staging = folder / f".{name}.{socket.gethostname()}"
    meta = {key: encoder.made_by[key] for key in ("vae", "text") if encoder.made_by[key]}
    try:
        dataset = readable(job.source)
        with ShardWriter(staging, samples_per_shard=len(dataset), overwrite=True) as writer:
            for samples, bad in decoded(dataset, job.count, encoder.cfg.batch_size):
                for sample, tensors in zip(samples, encoder(samples) if samples else [], strict=True):
                    members = {"safetensors": save(tensors)}
                    writer.write_members(
                        sample["key"], members, sample["caption"], {**sample["meta"], **meta}
                    )
                for key, why in bad.items():
                    writer.fail(key, why)
                progress(len(samples) + len(bad))
            if not writer.count:
                raise NothingUsable(f"none of its {len(dataset)} pictures can be read")
    except NothingUsable as error:
        print(f"{job.source} is left out: {error}", flush=True)
        write_json(folder / f"{name}_stats.json", {"count": 0, "successes": 0, RECORD: made_by})
        return 0
    stats = json.loads((staging / "00000_stats.json").read_text())
    for extension in ("parquet", "tar"):
        os.replace(staging / f"00000.{extension}", folder / f"{name}.{extension}")
    write_json(folder / f"{name}_stats.json", {**stats, RECORD: made_by})
    shutil.rmtree(staging)
    return stats["successes"]


def decoded(
    dataset: ShardDataset, count: int | None, batch_size: int
) -> Iterator[tuple[list[dict[str, Any]], dict[str, str]]]:
    """(samples, key -> why it cannot be read) of each batch in turn, the next one decoded meanwhile by threads."""

    def read(i: int) -> dict[str, Any] | BadSample:
        try:
            return dataset.read(i)
        except BadSample as error:
            return error

    count = len(dataset) if count is None else count
    with ThreadPoolExecutor(READERS) as pool:
        starts = iter(range(0, count, batch_size))
        coming: deque = deque()

        def ahead() -> None:
            for start in starts:
                rows = range(start, min(start + batch_size, count))
                coming.append((rows, [pool.submit(read, i) for i in rows]))
                return

        ahead()
        while coming:
            ahead()
            rows, reads = coming.popleft()
            found = {i: done.result() for i, done in zip(rows, reads, strict=True)}
            bad = {dataset.key(i): str(s) for i, s in found.items() if isinstance(s, BadSample)}
            yield [s for s in found.values() if not isinstance(s, BadSample)], bad


def encode_with_ray(cfg: EncoderConfig, jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[int]:
    """Encode the shards of `jobs` by Ray tasks; gives how many samples each holds, as they come."""
    places = {name: getattr(cfg, name) for name in ("vae", "text_encoder", "tokenizer")}
    absolute: dict[str, Any] = {name: str(Path(place).resolve()) for name, place in places.items() if place}
    cfg = replace(cfg, **absolute)
    work = partial(encode_shard_with, cfg, folder.resolve())
    return ray_jobs.each(work, [replace(job, source=job.source.resolve()) for job in jobs], workers)


def encode_shard_with(cfg: EncoderConfig, folder: Path, job: Job) -> int:
    """`encode_shard` by the networks of a config, loaded once a worker process."""
    return encode_shard(load_encoder(cfg), job, folder)


def publish(making: Path, jobs: Sequence[Job], encoder: Encoder) -> int | None:
    """Make a hidden folder RUN/latents/ if all shards are there; gives how many pictures they hold, else None.

    Any rank may be the last; the others then find it done. Unfinished runs of other settings are removed.
    """
    run = making.parent
    names = [job.source.stem for job in jobs]
    with locked(run):
        if making.exists():
            if not all((making / f"{name}_stats.json").is_file() for name in names):
                return None
            if not any(making.glob("*.tar")):
                shutil.rmtree(making)
                raise ValueError(f"no usable sample in {jobs[0].source.parent}: see above")
            if encoder.cfg.text_encoder:
                write_weights(making / EMPTY_PROMPT, {"text": encoder.texts([""])[0]})
            staged = [path for path in making.iterdir() if path.is_dir()]
            for left_over in [*staged, *(p for p in run.glob(MAKING.format("*")) if p != making)]:
                shutil.rmtree(left_over)
            replace_folder(making, run / LATENTS)
    return sum(json.loads((run / LATENTS / f"{name}_stats.json").read_text())["successes"] for name in names)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """This process alone, of all on this run folder, inside the `with` block."""
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
