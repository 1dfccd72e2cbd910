"""What may be asked of a batch beside its rows, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionfm.batch.jobs import Run
from diffusionfm.batch.phrases import Wildcards
from diffusionfm.batch.report import MOST_SHEETS
from diffusionfm.batch.stores import STORES
from diffusionfm.checks import check_prompt, check_seed, check_settings
from diffusionfm.formats import Finish
from diffusionfm.lora import WEIGHTS

if TYPE_CHECKING:
    from diffusionfm.batch.draw import Recipe
    from diffusionfm.pipeline import DiffusionFMPipeline

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Options:
    """The settings of a batch. ValueError for what cannot be.

    seed: a row without its own takes one from (seed, id, repeat); with its own, repeat k uses that + k. So no
        seed depends on row order, batch size, worker or restarts. repeats: pictures a row.
    steps, guidance, negative_prompt, width, height: None takes the model's; a row's own columns override them.
    only: ids of the rows wanted, none for all. wildcards_folder: of the files that `__NAME__` picks a line from.
    batch_size: pictures in a network call, None for what memory takes. deterministic: one, and on CUDA deterministic
        kernels, so that a picture's bytes do not depend on its company.
    to: "folder", "webdataset" or "parquet", with `samples_per_shard` in a file. format, background, size: see
        `Finish`. metadata: pictures carry their parameters. sheets: contact sheets of 100 pictures, at most.
    retry_failed: try failed pictures again, but for rows that are broken still. What failed of rows that are no more is
        forgotten.
    engine: "local", or "ray": `workers` of a Ray cluster draw (0: one a GPU, or else one a core), this process writes.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    repeats: int = 1
    only: Sequence[str] = ()
    wildcards_folder: str | Path | None = None
    batch_size: int | None = None
    deterministic: bool = False
    to: str = "folder"
    samples_per_shard: int = 1000
    format: str = "png"
    background: str | None = None
    size: int | None = None
    metadata: bool = True
    sheets: int = 1
    retry_failed: bool = False
    engine: str = "local"
    workers: int = 0

    def __post_init__(self) -> None:
        check_settings(
            steps=self.steps,
            guidance=self.guidance,
            height=self.height,
            width=self.width,
            num_images=self.repeats,
        )
        check_settings(num_images=self.batch_size)
        check_seed(self.seed, self.repeats)
        check_prompt(self.negative_prompt, "negative_prompt")
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}: use {' or '.join(ENGINES)}")
        if self.to not in STORES:
            raise ValueError(f"unknown output {self.to!r}: use {', '.join(STORES)}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}")
        if not 0 <= self.sheets <= MOST_SHEETS:
            raise ValueError(f"contact sheets must be from 0 to {MOST_SHEETS}, got {self.sheets}")
        _ = self.finish

    @cached_property
    def finish(self) -> Finish:
        """What becomes of a drawn picture."""
        return Finish(self.format, self.background, self.size)

    @cached_property
    def wildcards(self) -> Wildcards:
        """The folder's wildcards; without a folder, none."""
        return Wildcards(None if self.wildcards_folder is None else Path(self.wildcards_folder))

    def run(self, pipe: DiffusionFMPipeline) -> Run:
        """The options with a model's defaults. ValueError for what it cannot draw."""
        settings = {"negative_prompt": self.negative_prompt, **self.settings(pipe)}
        output = {"to": self.to, **self.finish.settings()}
        return Run(
            self.seed, settings, output, made_by(pipe), self.repeats, frozenset(self.only), pipe.settings
        )

    def settings(self, pipe: DiffusionFMPipeline) -> dict[str, Any]:
        """Steps, guidance, height and width of rows that name none. ValueError for what the model cannot draw."""
        chosen: dict[str, Any] = {
            name: getattr(self, name) for name in ("steps", "guidance", "width", "height")
        }
        if self.size is not None and self.width is None and self.height is None:
            chosen["width"], chosen["height"] = pipe.size_for(self.size)
        return pipe.settings(**chosen)

    def processes(self, pipe: DiffusionFMPipeline) -> tuple[int, int]:
        """How many draw at a time, as far as this machine can tell, and how many of them share a device's memory."""
        if self.engine == "local":
            return 1, 1
        import torch

        gpus = torch.cuda.device_count() if pipe.device.type == "cuda" else 0
        own = gpus or os.cpu_count() or 1
        wanted = self.workers or own
        here = min(wanted, own)
        return wanted if os.environ.get("RAY_ADDRESS") else here, 1 if gpus else here

    def recipe(self, pipe: DiffusionFMPipeline, run: Run) -> Recipe | None:
        """How Ray workers make the pictures; None when this process does."""
        if self.engine == "local":
            return None
        from diffusionfm.batch.draw import recipe

        return recipe(pipe, run.made_by, self.finish, self.metadata, self.deterministic)


def made_by(pipe: DiffusionFMPipeline) -> dict[str, Any]:
    """Which weights draw: the model's name and hash, and of LoRAs name:scale and files' hash, or the phrasebook's."""
    book = None if pipe.loras else pipe.phrasebook
    return {
        "model": pipe.model_name,
        "model_hash": pipe.fingerprint(),
        "lora": [f"{name}:{scale:g}" for name, scale in pipe.loras.items()],
        "lora_hashes": [_lora_hash(pipe.lora_sources[name]) for name in pipe.loras],
        **({"phrasebook": book.digest} if book else {}),
    }


def _lora_hash(source: Path) -> str:
    """12 hex digits of the SHA-256 over a LoRA's file, or over its folder's for the denoiser and the text encoder."""
    digest = hashlib.sha256()
    for file in [source] if source.is_file() else [source / WEIGHTS, source / "text_encoder" / WEIGHTS]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:12]
