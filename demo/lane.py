"""The studio's side of the engine: who is drawing, how far each drawing is, and what stops it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any

from PIL import Image

from diffusionfm.drawing import Cancelled, Pictures, Task
from diffusionfm.serve.access import Access
from diffusionfm.serve.jobs import Closed, QueueFull, Request
from diffusionfm.serve.models import Models

from .runs import Runs

PREVIEWS = 7
"""How many previews a drawing shows, whatever its number of steps."""
AT_ONCE = 24
"""Drawings of pages that may be under way at a time; the engine lets them share network calls, and take turns."""
PATIENCE, KEPT = 20.0, 600.0
"""Seconds that a drawing goes on after its page was closed, and that its pictures are kept: a reload finds both."""
MOST_KEPT = 128
"""Finished drawings that are kept, for pages that are open or may come back: the oldest go first."""
LOOK = 0.5
"""Seconds between looks at the place in the queue."""
Update = dict[Any, Any]
"""What an event gives: new values by component."""
FAILED = "the picture could not be drawn: try a smaller size or fewer pictures; the studio's log says why"


class Failed(Exception):
    """A drawing broke off, for what only the log tells."""


REFUSED = (ValueError, QueueFull, Closed, Failed)
"""What a drawing that was not taken, or that broke off, raises, in words for a person."""


def outcome(drawn: Future[Pictures]) -> Pictures:
    """The pictures of a drawing, once it has ended. Raises one of REFUSED for whatever the engine raised."""
    error = drawn.exception()
    if error is None or isinstance(error, REFUSED):
        return drawn.result()
    raise Failed(FAILED) from error  # the engine has logged it


@dataclass(frozen=True)
class Waiting:
    """Not begun: as many requests of others are drawn before this one."""

    ahead: int


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


def turn_of(request: Any) -> str:
    """Whose turn a drawing takes: the login's, or where there is none that of an open page at its address."""
    return Access.turn(request.state.caller, owner_of(request))


@dataclass(eq=False)
class Drawing:
    """One person's drawing, from the click to the last picture. Several may look on, one after another.

    It is kept for a while, so it holds no engine: model: the name of the one that draws; ahead: of the queue before it;
    advice: what to know of the prompt."""

    request: Request
    page: str  # the open page that looks on; another after a reload
    model: str
    advice: list[str]
    future: Future[Pictures] = field(default_factory=Future)
    ahead: Callable[[], int] = lambda: 0
    step: tuple[int, int, Callable[[], list[Image.Image]] | None] = (0, 0, None)
    paces: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=8))  # (when, step), of late
    changed: Condition = field(default_factory=Condition)
    left: float | None = None  # when the page was closed
    ended: float | None = None

    def report(self, step: int, total: int, preview: Callable[[], list[Image.Image]]) -> bool:
        """The engine's on_step: notes the step; gives up a drawing whose page is closed for too long."""
        with self.changed:
            self.step = step, total, preview
            self.paces.append((time.monotonic(), step))
            self.changed.notify_all()
        return self.left is not None and time.monotonic() > self.left + PATIENCE

    def end(self, _: Future[Pictures]) -> None:
        """The future's callback."""
        with self.changed:
            self.ended, self.step, self.ahead = time.monotonic(), (*self.step[:2], None), lambda: 0
            self.changed.notify_all()

    def seconds_left(self) -> float:
        """By the pace of the last steps: it changes with the company."""
        (first, step), (last, now) = self.paces[0], self.paces[-1]
        return (last - first) / max(1, now - step) * (self.step[1] - now)


class Lane:
    """Drawings of open pages. Each is known by its owner, so nobody can stop, or see, another's.

    runs: the long ones, trainings and batches. pipe: the first model's, after which pages are laid out. metadata:
    whether files of pictures tell how they were made."""

    def __init__(self, models: Models, runs: Runs | None = None, metadata: bool = True):
        self.models, self.pipe, self.metadata = models, models.first.pipe, metadata
        self.runs = runs or Runs()
        self.person: Any = None  # the component that knows whose page it is
        self.model: Any = None  # the picker of models
        self.opened: Callable[[Any], None] = lambda event: (
            None
        )  # adds what follows when a page has been opened
        self.pickers: dict[str, Any] = {}  # of adapters, by tab
        self._drawings: dict[str, Drawing] = {}

    def start(
        self, owner: str, request: Request, page: str = "", model: str | None = None, turn: str = ""
    ) -> Drawing:
        """Queue the owner's next drawing, which takes the place of the last one. Raises one of REFUSED at once.

        turn: whose turn it takes, as `turn_of` has it; "" for the owner's own."""
        self._sweep()
        engine = self.models.engine(model)
        if old := self._drawings.get(owner):
            old.future.cancel()
        elif self.busy >= AT_ONCE:
            raise QueueFull(f"{self.busy} people are drawing: try again a little later", 5.0)
        task = Task(request.prompt, request.negative_prompt, request.seed)
        advice = engine.pipe.advice([task], [name for name, _ in request.loras])
        drawing = Drawing(request, page, engine.pipe.model_name, advice)
        drawing.paces.append((time.monotonic(), 0))
        drawing.future = engine.submit(request, turn or owner, drawing.report)
        drawing.ahead = partial(engine.ahead, drawing.future)
        drawing.future.add_done_callback(drawing.end)
        self._drawings[owner] = drawing
        return drawing

    @property
    def busy(self) -> int:
        """Drawings under way."""
        return sum(drawing.ended is None for drawing in [*self._drawings.values()])

    def find(self, owner: str, page: str) -> Drawing | None:
        """The owner's drawing, under way or of late, for the page that looks on from now; None without one."""
        self._sweep()
        drawing = self._drawings.get(owner)
        if drawing is not None:
            drawing.page, drawing.left = page, None
        return drawing

    def watch(self, drawing: Drawing) -> Iterator[Waiting | Step | Pictures]:
        """How it goes, as it goes, and the pictures at last. Who stops looking on stops nothing.

        Raises as `outcome` does, and `Cancelled` when the owner cancelled.
        """
        seen, place, looks = 0, None, -1
        while drawing.ended is None:
            with drawing.changed:
                if drawing.ended is None and drawing.step[0] <= seen:
                    drawing.changed.wait(LOOK)
                step, total, preview = drawing.step
                left = drawing.seconds_left()
            if step > seen:
                look = step * (PREVIEWS + 1) // total  # a new one is due each time that this grows
                show = preview() if preview and looks < look and step < total else None
                seen, looks = step, look
                yield Step(step, total, left, show)
            elif not seen and (ahead := drawing.ahead()) != place:
                place = ahead
                yield Waiting(ahead)
        try:
            yield outcome(drawing.future)
        except CancelledError as error:
            raise Cancelled("stopped") from error

    def draw(self, owner: str, request: Request) -> Iterator[Waiting | Step | Pictures]:
        """`start` and `watch`; to leave the iterator early stops the drawing."""
        drawing = self.start(owner, request)
        try:
            yield from self.watch(drawing)
        finally:
            drawing.future.cancel()
            if self._drawings.get(owner) is drawing:
                del self._drawings[owner]

    def cancel(self, owner: str) -> bool:
        """Stop the owner's drawing, running or waiting, within a step; whether there was one."""
        drawing = self._drawings.get(owner)
        return drawing is not None and drawing.future.cancel()

    def leave(self, page: str) -> None:
        """A page was closed: what it looked on is drawn on for PATIENCE seconds, in case it comes back."""
        for drawing in [*self._drawings.values()]:
            if drawing.page == page:
                drawing.left = time.monotonic()
        self._sweep()

    def _sweep(self) -> None:
        """Stop what nobody came back to; forget what ended and nobody looks at, and the oldest of too many."""
        now = time.monotonic()
        for drawing in [*self._drawings.values()]:
            if drawing.left is not None and now > drawing.left + PATIENCE:
                drawing.future.cancel()
        ended = [(d.left or now, owner) for owner, d in [*self._drawings.items()] if d.ended is not None]
        ended.sort()
        for _, owner in ended[: max(0, len(ended) - MOST_KEPT)] + [e for e in ended if now > e[0] + KEPT]:
            self._drawings.pop(owner, None)
