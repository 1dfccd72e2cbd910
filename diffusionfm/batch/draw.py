"""Groups of jobs become files' bytes: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffusionfm.batch import fit
from diffusionfm.batch.jobs import Job, Shape
from diffusionfm.batch.options import made_by
from diffusionfm.formats import Finish

if TYPE_CHECKING:
    from diffusionfm.drawing import Pictures
    from diffusionfm.pipeline import DiffusionFMPipeline

WORDS = 1024  # prompts whose features are kept, or what the model cannot read of them


@dataclass
class Drawn:
    """What became of a job: a picture, then the bytes of its file and its size in pixels; or why there is none.

    told: what the file may say of how it was made. read: what was drawn in the place of the prompt, None for itself.
    kind: of the failure: "row" (it asks for what cannot be), "numbers" (not finite), "memory" or "drawing".
    seconds: of its network call; share: the same by the pictures in that call.
    """

    job: Job
    seconds: float = 0.0
    share: float = 0.0
    image: Image.Image | None = None
    told: dict[str, Any] = field(default_factory=dict)
    read: str | None = None
    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    error: str | None = None
    kind: str | None = None


Batches = Iterable[list[Job]]


class Drawer:
    """Draws groups of jobs with one pipeline; a group that fails is halved until the bad picture is alone.

    batch_size: pictures in a network call; None for what memory takes. Running out of memory lowers it for that shape.
    sharing: processes that share the device's memory.
    """

    def __init__(self, pipe: DiffusionFMPipeline, batch_size: int | None = None, sharing: int = 1):
        self.pipe = pipe
        self.batch_size = batch_size
        self.sharing = sharing
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
        return fit.batch_size(self.pipe.device, self.needs[width, height, copies], self.sharing)

    def draw(self, jobs: list[Job]) -> list[Drawn]:
        """The pictures of jobs that share a shape, or of a broken one its failure; OSError when the device is dead."""
        if jobs[0].error:
            return [Drawn(jobs[0], error=jobs[0].error, kind="row")]
        began = time.monotonic()
        try:
            found = self._call(jobs)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            if _kind(error) == "drawing" and not answers(self.pipe.device):
                raise OSError(
                    f"the device has stopped working ({' '.join(str(error).split())[:500]}): restart it, then run the "
                    "same command again; the pictures of this call were not recorded"
                ) from error
            if len(jobs) == 1:
                said = " ".join(str(error).split())[:500]
                return [Drawn(jobs[0], error=said, kind=_kind(error))]
            if _kind(error) == "memory":
                self._shrink(jobs)
            one, two = _halves(jobs)
            return self.draw(one) + self.draw(two)
        seconds = time.monotonic() - began
        share = seconds / len(jobs)
        drawn = zip(jobs, found.images, found.told, strict=True)
        return [Drawn(job, seconds, share, image, told, told.get("read_as")) for job, image, told in drawn]

    def lost(self, jobs: list[Job], why: str) -> tuple[list[list[Job]], list[list[Drawn]]]:
        """What is to be done for a group that kills its workers, its halves; or of a picture alone the failure."""
        if len(jobs) == 1:
            return [], [[Drawn(jobs[0], error=why, kind="memory")]]
        self._shrink(jobs)
        return _halves(jobs), []

    def _shrink(self, jobs: list[Job]) -> None:
        """Let no later group of this shape be larger than half of this one, which is too large for the memory."""
        shape = jobs[0].shape
        self.sizes[shape] = min((len(jobs) + 1) // 2, self.size(shape))

    def _call(self, jobs: list[Job]) -> Pictures:
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
        )


def _halves(jobs: list[Job]) -> list[list[Job]]:
    half = (len(jobs) + 1) // 2
    return [jobs[:half], jobs[half:]]


def _kind(error: Exception) -> str:
    if isinstance(error, ValueError):
        return "row"
    if isinstance(error, ArithmeticError):
        return "numbers"
    out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return "memory" if out else "drawing"


def encode(drawn: Drawn, finish: Finish, metadata: bool) -> Drawn:
    """The same with its file's bytes; metadata: whether the file says how it was made. What is encoded stays so."""
    if drawn.image is None:
        return drawn
    data = finish.encode(drawn.image, drawn.told if metadata else None)
    return replace(drawn, image=None, told={}, data=data, size=finish.pixels(drawn.image))


def kernels(deterministic: bool) -> AbstractContextManager[Any]:
    """The same CUDA kernels each time, if so asked, rather than those found fastest; a CPU has no choice."""
    if not deterministic:
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


def answers(device: torch.device) -> bool:
    """Whether a device still computes: after some errors a GPU does nothing more for its process."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except RuntimeError:
        return False


# ------------------------------------------------------------------ Ray


@dataclass(frozen=True)
class Recipe:
    """How a worker, in another process, makes the same pictures."""

    model: str
    loras: tuple[tuple[str, float], ...]
    dtype: str
    device: str
    hash: str
    lora_hashes: tuple[str, ...]
    phrasebook: str | None
    fast: bool
    threads: int | None  # None: as the worker has them
    finish: Finish
    metadata: bool

    @property
    def deterministic(self) -> bool:
        """Whether the worker's threads, which change how sums are rounded, and its kernels are the same each time."""
        return self.threads is not None


def recipe(
    pipe: DiffusionFMPipeline, made: dict[str, Any], finish: Finish, metadata: bool, deterministic: bool
) -> Recipe:
    """The recipe of a loaded pipeline; made: what `made_by` tells of it. ValueError for one that is in memory alone."""
    folder = pipe.config.get("_name_or_path")
    if not folder or not Path(folder).is_dir():
        raise ValueError(
            "--engine ray loads the model on each worker: save it with save_pretrained, and load that"
        )
    loras = tuple((str(pipe.lora_sources[name].resolve()), scale) for name, scale in pipe.loras.items())
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    where = (str(Path(folder).resolve()), loras, dtype, pipe.device.type)
    hashes = made["model_hash"], tuple(made["lora_hashes"]), made.get("phrasebook")
    threads = torch.get_num_threads() if deterministic else None
    return Recipe(*where, *hashes, pipe.fast, threads, finish, metadata)


@lru_cache(1)
def _load(how: Recipe) -> Drawer:
    """The pipeline of a recipe, loaded once a process."""
    from diffusionfm.pipeline import DiffusionFMPipeline

    if how.threads:
        torch.set_num_threads(how.threads)
    pipe = DiffusionFMPipeline.from_pretrained(how.model, dtype=how.dtype, device=how.device, fast=how.fast)
    for folder, scale in how.loras:
        pipe.load_lora(folder, scale, any_model=True)  # whoever began the batch was asked
    found = made_by(pipe)
    if found["model_hash"] != how.hash:
        raise ValueError(f"{how.model} is another model on this machine: copy the same folder to all")
    if found.get("phrasebook") != how.phrasebook:
        raise ValueError(f"{how.model} has another phrasebook on this machine: copy the same folder to all")
    for (folder, _), here, there in zip(how.loras, found["lora_hashes"], how.lora_hashes, strict=True):
        if here != there:
            raise ValueError(f"{folder} is another LoRA on this machine: copy the same to all")
    return Drawer(pipe)


def draw_remotely(how: Recipe, jobs: list[Job]) -> list[Drawn]:
    """Draw and encode a group on a worker; harmless when done twice."""
    drawer = _load(how)
    with kernels(how.deterministic):
        return [encode(drawn, how.finish, how.metadata) for drawn in drawer.draw(jobs)]


def draw_all(drawer: Drawer, batches: Batches, how: Recipe | None, workers: int) -> Iterator[list[Drawn]]:
    """What becomes of each group: drawn here, one after the other, or by a recipe on Ray, as they come."""
    if how is None:
        yield from map(drawer.draw, batches)
        return
    from diffusionfm import ray_jobs

    yield from ray_jobs.each(partial(draw_remotely, how), batches, workers, drawer.lost)
