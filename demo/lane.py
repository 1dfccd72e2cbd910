"""The studio's side of the engine: who is drawing, how far each drawing is, and what stops it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Any

from PIL import Image

from diffusionfm.drawing import Cancelled
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, QueueFull, Request

PREVIEWS = 7
"""How many previews a drawing shows, whatever its number of steps."""
AT_ONCE = 32
"""Drawings that may be under way at a time; the engine lets them share network calls, and take turns."""
REFUSED = (ValueError, QueueFull, Closed)
"""What a drawing that was not taken raises, in words for a person."""


@dataclass(frozen=True)
class Step:
    """A step done: `step` of `total`, the seconds still expected, and now and then a look at the pictures."""

    step: int
    total: int
    seconds_left: float
    previews: list[Image.Image] | None = None


def owner_of(request: Any) -> str:
    """Who asks: the session of an open page."""
    return str(request.session_hash)


@dataclass(eq=False)
class Job:
    """One person's drawing, from the click to the last picture."""

    cancelled: Event = field(default_factory=Event)
    future: Future | None = None


class Lane:
    """Drawings of open pages. Each is known by its owner, so nobody can stop another's."""

    def __init__(self, engine: Engine):
        self.engine, self.pipe = engine, engine.pipe
        self._jobs: dict[str, Job] = {}

    def enter(self, owner: str) -> int:
        """Register the owner's next drawing; returns how many others are under way."""
        others = sum(key != owner for key in self._jobs)
        self._jobs[owner] = Job()
        return others

    def cancel(self, owner: str) -> bool:
        """Stop the owner's drawing, running or waiting, within a step; whether there was one."""
        job = self._jobs.get(owner)
        if job is None:
            return False
        job.cancelled.set()
        if job.future is not None:
            job.future.cancel()
        return True

    def leave(self, owner: str) -> None:
        """Stop the owner's drawing and forget it: the page was closed, or the drawing never began."""
        self.cancel(owner)
        self._jobs.pop(owner, None)

    def draw(self, owner: str, request: Request) -> Iterator[Any]:
        """Draw: yields `Step`s, then the pictures.

        Whatever the engine raises is raised here, `Cancelled` when the owner cancelled. Leaving the iterator early
        stops the drawing too.
        """
        job = self._jobs.get(owner) or self._jobs.setdefault(owner, Job())
        events: SimpleQueue[Any] = SimpleQueue()
        began = time.monotonic()
        try:
            job.future = self.engine.submit(request, owner, lambda *step: events.put(step))
            job.future.add_done_callback(events.put)
            if job.cancelled.is_set():
                job.future.cancel()
            while not isinstance(event := events.get(), Future):
                step, total, preview = event
                yield _step(step, total, preview, time.monotonic() - began)
            yield event.result()
        except CancelledError as error:
            raise Cancelled("stopped") from error
        finally:
            if job.future is not None:
                job.future.cancel()
            if self._jobs.get(owner) is job:
                del self._jobs[owner]

    def result(self, owner: str, request: Request) -> Any:
        """Draw without looking on: the pictures."""
        return self.engine.submit(request, owner).result()


def _step(step: int, total: int, preview: Any, seconds: float) -> Step:
    look = step < total and step % max(1, round(total / (PREVIEWS + 1))) == 0
    return Step(step, total, seconds / step * (total - step), preview() if look else None)
