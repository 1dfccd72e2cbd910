"""The models that requests may name: the one a server was opened with, and those of a folder, opened when asked for."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from diffusionfm.checks import SHIPPED, check_model
from diffusionfm.lora import FEW_STEP
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, Counts, QueueFull

LOG = logging.getLogger("diffusionfm.serve")
MOST = 2
"""Models that are kept in memory beside the first."""
GRACE = 10.0
"""Seconds that one stays at least after it was asked for, so that what asked can draw with it."""


def find_models(
    folder: Path, model: str | Path | None = None, fast: bool = False
) -> tuple[dict[str, Path], list[str]]:
    """The pipelines among a folder's sub-folders by their names, and why others cannot be used, a line each.

    Hidden folders, links, and folders without a model_index.json are none. model: the one that is open already (None:
    the shipped one); it is not named again. fast: whether models draw in few steps. Raises ValueError where there is
    no such folder, or no pipeline in it.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of models at {folder}: give one whose sub-folders are pipelines")
    first, found, left_out = Path(model or SHIPPED).resolve(), {}, []
    inside = [path for path in sorted(folder.iterdir()) if not (path.is_symlink() or path.name[0] == ".")]
    inside = [path for path in inside if (path / "model_index.json").is_file()]
    if not inside:
        raise ValueError(f"no sub-folder of {folder} is a pipeline: each has a model_index.json")
    for path in inside:
        if path.resolve() == first:
            continue
        try:
            check_model(path)
            if path.name == first.name:
                raise ValueError(f"the model at {first} has that name: rename one of them")
            if fast and not (path / FEW_STEP).is_dir():
                raise ValueError(f"it has no {FEW_STEP} adapter: open it without --fast")
            found[path.name + ("-fast" if fast else "")] = path
        except (ValueError, OSError) as error:
            left_out.append(f"the model {path.name!r} is left out: {error}")
    return found, left_out


class Models:
    """An engine for every model that is in use: the first stays, others come when they are asked for.

    They are opened as the first was: on its device, in its precision, with its limits and its few steps. At most MOST
    of them are kept: the one that was asked for longest ago goes, unless it draws. `close` ends all.
    """

    def __init__(self, first: Engine, folders: Mapping[str, Path] | None = None):
        self.first, self.folders = first, dict(folders or {})
        self._open: dict[str, tuple[Engine, float]] = {}  # and when it was asked for; the latest last
        self._gone = Counts()  # of engines that are closed
        self._lock = threading.Lock()  # of what is open: held for a moment
        self._opening = threading.Lock()  # held while one is opened or closed
        self._closing = False

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """What may be asked for, the first before all."""
        return [self.first.pipe.model_name, *self.folders]

    @property
    def engines(self) -> list[Engine]:
        """Those that are open now."""
        with self._lock:
            return [self.first, *(engine for engine, _ in self._open.values())]

    def engine(self, name: str | None = None) -> Engine:
        """The engine of a model, opened if need be; None is the first. Submit to it within GRACE seconds.

        Raises ValueError for another name, QueueFull when all that are open draw, Closed when it cannot be opened."""
        if name in (None, self.first.pipe.model_name):
            return self.first
        if name not in self.folders:
            raise ValueError(f"no such model: choose {', '.join(self.names)}")
        return self.ready(name) or self._open_now(name)

    def ready(self, name: str | None = None) -> Engine | None:
        """The engine of a model that is open, at once, to submit to as of `engine`; else None."""
        if name in (None, self.first.pipe.model_name):
            return self.first
        with self._lock:
            if self._closing or name not in self._open:
                return None
            engine, _ = self._open.pop(name)
            self._open[name] = engine, time.monotonic()
            return engine

    def _open_now(self, name: str) -> Engine:
        """One after another; those that are open draw meanwhile."""
        with self._opening:
            if self._closing:
                raise Closed("the server is shutting down")
            if engine := self.ready(name):  # somebody else has opened it
                return engine
            self._make_room()
            engine = self._opened(name)
            with self._lock:
                self._open[name] = engine, time.monotonic()
            return engine

    def _make_room(self) -> None:
        with self._lock:
            if len(self._open) < MOST:
                return
            now = time.monotonic()
            idle = [
                n for n, (engine, asked) in self._open.items() if not engine.waiting and now > asked + GRACE
            ]
            if not idle:
                raise QueueFull(f"{MOST + 1} models are in use: try again a little later", GRACE)
            engine, _ = self._open.pop(idle[0])
        engine.close()
        self._gone = _sum(self._gone, engine.counts)
        del engine
        gc.collect()  # networks and their layers know one another

    def _opened(self, name: str) -> Engine:
        first = self.first.pipe
        try:
            pipe = DiffusionFMPipeline.from_pretrained(
                self.folders[name], dtype=first.transformer.dtype, device=first.device, fast=first.fast
            )
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            LOG.error("the model %r cannot be opened", name, exc_info=error)
            raise Closed(f"the model {name!r} cannot be opened: the server's log says why") from error
        return Engine(pipe, self.first.limits, self.first.safety)

    # -------------------------------------------------------------- of all together

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self.first.alive

    @property
    def waiting(self) -> int:
        """Pictures that are not finished yet, those being drawn among them."""
        return sum(engine.waiting for engine in self.engines)

    @property
    def counts(self) -> Counts:
        """What has been done since the beginning."""
        return _sum(self._gone, *(engine.counts for engine in self.engines))

    def refuse(self) -> None:
        """Take no more requests; those there are will be drawn."""
        self._closing = True
        for engine in self.engines:
            engine.refuse()

    def close(self, timeout: float | None = None) -> None:
        """Draw what is queued, for `timeout` seconds a model at most, None for as long as it takes; fail the rest."""
        self.refuse()
        with self._opening:
            for engine in self.engines:
                engine.close(timeout)


def _sum(*counts: Counts) -> Counts:
    return Counts(*map(sum, zip(*map(astuple, counts), strict=True)))
