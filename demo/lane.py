"""The one lane through which every drawing passes: a worker thread, its progress, a flag that stops it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Any

from PIL import Image

PREVIEWS = 7
"""How many previews a drawing shows, whatever its number of steps."""


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


class Lane:
    """Serialises the use of one pipeline. A job is known by its owner, so nobody can stop another's."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._jobs: dict[str, Job] = {}

    def enter(self, owner: str) -> int:
        """Register the owner's next drawing; returns how many others stand before it."""
        ahead = sum(key != owner for key in self._jobs)
        self._jobs[owner] = Job()
        return ahead

    def cancel(self, owner: str) -> bool:
        """Stop the owner's drawing, running or waiting, within a step; whether there was one."""
        job = self._jobs.get(owner)
        if job is not None:
            job.cancelled.set()
        return job is not None

    def leave(self, owner: str) -> None:
        """Stop the owner's drawing and forget it: the page was closed, or the drawing never began."""
        self.cancel(owner)
        self._jobs.pop(owner, None)

    def draw(self, owner: str, prompt: str, **settings: Any) -> Iterator[Any]:
        """Draw with the pipeline's own arguments: yields `Step`s, then the pipeline's result.

        Whatever the pipeline raises is raised here, `Cancelled` when the owner cancelled. Leaving the
        iterator early stops the drawing too.
        """
        job = self._jobs.get(owner) or self._jobs.setdefault(owner, Job())
        events: SimpleQueue[Step | Future] = SimpleQueue()
        future = self._worker.submit(self._work, job, events, prompt, settings)
        future.add_done_callback(events.put)
        try:
            while not isinstance(event := events.get(), Future):
                yield event
            yield event.result()
        finally:
            job.cancelled.set()
            if self._jobs.get(owner) is job:
                del self._jobs[owner]

    def result(self, prompt: str, **settings: Any) -> Any:
        """Draw without looking on: the pipeline's result."""
        return self._worker.submit(self.pipe, prompt, **settings).result()

    def _work(self, job: Job, events: SimpleQueue, prompt: str, settings: dict[str, Any]) -> Any:
        began = time.monotonic()

        def on_step(step: int, total: int, preview: Any) -> bool:
            if job.cancelled.is_set():
                return True
            look = step < total and step % max(1, round(total / (PREVIEWS + 1))) == 0
            left = (time.monotonic() - began) / step * (total - step)
            events.put(Step(step, total, left, preview() if look else None))
            return job.cancelled.is_set()

        return self.pipe(prompt, on_step=on_step, **settings)
