"""Groups of jobs become files' bytes: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffusionfm.batch import fit
from diffusionfm.batch.jobs import Job, Shape
from diffusionfm.formats import Finish

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

WORDS = 1024  # prompts whose features are kept, or what the model cannot read of them


@dataclass
class Drawn:
    """What became of a job: a picture, then the bytes of its file and its size in pixels; or why there is none.

    kind: of the failure: "row" (it asks for what cannot be), "numbers" (not finite), "memory" or "drawing".
    seconds: of its network call; share: the same by the pictures in that call.
    """

    job: Job
    seconds: float = 0.0
    share: float = 0.0
    image: Image.Image | None = None
    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    error: str | None = None
    kind: str | None = None


Batches = Iterable[list[Job]]


class Drawer:
    """Draws groups of jobs with one pipeline; a group that fails is halved until the bad picture is alone.

    batch_size: pictures in a network call; None for what memory takes. Running out of memory lowers it for that shape.
    """

    def __init__(self, pipe: DiffusionFMPipeline, batch_size: int | None = None):
        self.pipe = pipe
        self.batch_size = batch_size
        self.sizes: dict[Shape, int] = {}
        self.needs: dict[tuple[int, int, int], int] = {}
        self.words: dict[str, torch.Tensor] = {}

    def size(self, shape: Shape) -> int:
        """How many jobs of a shape share a call."""
        if shape not in self.sizes:
            self.sizes[shape] = self.batch_size or self._fit(shape)
        return self.sizes[shape]

    def _fit(self, shape: Shape) -> int:
        _, guidance, width, height = shape
        copies = 1 if guidance == 1 else 2
        if (width, height, copies) not in self.needs:
            try:
                self.needs[width, height, copies] = fit.picture_bytes(self.pipe, width, height, copies)
            except ValueError:  # the networks do not take this size: each such job fails alone, and says why
                return 1
        return fit.batch_size(self.pipe.device, self.needs[width, height, copies])

    def draw(self, jobs: list[Job]) -> list[Drawn]:
        """The pictures of jobs that share a shape, or of one broken job its failure."""
        if jobs[0].error:
            return [Drawn(jobs[0], error=jobs[0].error, kind="row")]
        began = time.monotonic()
        try:
            images = self._call(jobs)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            if len(jobs) == 1:
                said = " ".join(str(error).split())[:500]
                return [Drawn(jobs[0], error=said, kind=_kind(error))]
            half = (len(jobs) + 1) // 2
            if _kind(error) == "memory":
                self.sizes[jobs[0].shape] = half
            return self.draw(jobs[:half]) + self.draw(jobs[half:])
        seconds = time.monotonic() - began
        return [
            Drawn(job, seconds, seconds / len(jobs), image) for job, image in zip(jobs, images, strict=True)
        ]

    def _call(self, jobs: list[Job]) -> list[Image.Image]:
        while len(self.words) > WORDS:
            self.words.pop(next(iter(self.words)))
        steps, guidance, width, height = jobs[0].shape
        return self.pipe(
            [job.prompt for job in jobs],
            negative_prompt=[job.settings["negative_prompt"] for job in jobs],
            seed=[job.seed for job in jobs],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            batch_size=len(jobs),
            words=self.words,
        ).images


def _kind(error: Exception) -> str:
    if isinstance(error, ValueError):
        return "row"
    if isinstance(error, ArithmeticError):
        return "numbers"
    out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return "memory" if out else "drawing"


def encode(drawn: Drawn, finish: Finish, describe: Callable[[Job], dict[str, Any] | None]) -> Drawn:
    """The same with its file's bytes; `describe` gives what the file says of itself. What is encoded stays so."""
    if drawn.image is None:
        return drawn
    data = finish.encode(drawn.image, describe(drawn.job))
    return replace(drawn, image=None, data=data, size=finish.pixels(drawn.image))


# ------------------------------------------------------------------ Ray


@dataclass(frozen=True)
class Recipe:
    """How a worker, in another process, makes the same pictures."""

    model: str
    loras: tuple[tuple[str, float], ...]
    dtype: str
    device: str
    hash: str
    fast: bool
    threads: int | None  # None: as the worker has them
    finish: Finish
    metadata: bool


def recipe(
    pipe: DiffusionFMPipeline, fingerprint: str, finish: Finish, metadata: bool, threads: int | None
) -> Recipe:
    """The recipe of a loaded pipeline. ValueError for one that is in memory alone."""
    folder = pipe.config.get("_name_or_path")
    if not folder or not Path(folder).is_dir():
        raise ValueError(
            "--engine ray loads the model on each worker: save it with save_pretrained, and load that"
        )
    loras = tuple((str(pipe.lora_sources[name].resolve()), scale) for name, scale in pipe.loras.items())
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    where = (str(Path(folder).resolve()), loras, dtype, pipe.device.type)
    return Recipe(*where, fingerprint, pipe.fast, threads, finish, metadata)


@lru_cache(1)
def _load(how: Recipe) -> Drawer:
    """The pipeline of a recipe, loaded once a process."""
    from diffusionfm.pipeline import DiffusionFMPipeline

    if how.threads:
        torch.set_num_threads(how.threads)
    pipe = DiffusionFMPipeline.from_pretrained(how.model, dtype=how.dtype, device=how.device, fast=how.fast)
    for folder, scale in how.loras:
        pipe.load_lora(folder, scale, any_model=True)  # whoever began the batch was asked
    if pipe.fingerprint() != how.hash:
        raise ValueError(f"{how.model} is another model on this machine: copy the same folder to all")
    return Drawer(pipe)


def draw_remotely(how: Recipe, jobs: list[Job]) -> list[Drawn]:
    """Draw and encode a group on a worker; harmless when done twice."""
    drawer = _load(how)

    def describe(job: Job) -> dict[str, Any] | None:
        return drawer.pipe.describe(job.prompt, job.seed, job.settings) if how.metadata else None

    return [encode(drawn, how.finish, describe) for drawn in drawer.draw(jobs)]


def draw_all(drawer: Drawer, batches: Batches, how: Recipe | None, workers: int) -> Iterator[list[Drawn]]:
    """What becomes of each group: drawn here, one after the other, or by a recipe on Ray, as they come."""
    if how is None:
        yield from map(drawer.draw, batches)
        return
    from diffusionfm import ray_jobs

    yield from ray_jobs.each(partial(draw_remotely, how), batches, workers)
