"""The studio's side of the engine: who is drawing, how far each drawing is, and what stops it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any

from PIL import Image

from diffusionfm.drawing import Cancelled, Pictures, Task
from diffusionfm.serve.access import Access
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, QueueFull, Request
from diffusionfm.serve.models import Models
from diffusionfm.serve.safety import blurred

from .runs import Runs

PREVIEWS = 7
"""How many previews a drawing shows, whatever its number of steps."""
AT_ONCE = 24
"""Drawings of pages that may be under way at a time; the engine lets them share network calls, and take turns."""
PATIENCE, KEPT = 20.0, 600.0
"""Seconds that a drawing goes on after its page was closed, and that its pictures are kept: a reload finds both."""
OPEN = 3600.0
"""Seconds that finished pictures are kept at most: a page that never says that it is open cannot say when it closes."""
MOST_KEPT = 2**26
"""Pixels of finished drawings that are kept, for pages that are open or may come back: the oldest go first."""
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
    """How far a drawing is: `step` of `total`, the seconds still expected, and now and then a look at the pictures.

    These are the steps of one request, or per cent of several. previews: of every picture, None before its first step.
    """

    step: int
    total: int
    seconds_left: float
    previews: list[Image.Image | None] | None = None


def owner_of(request: Any) -> str:
    """Who asks: the session of an open page."""
    return str(request.session_hash)


def turn_of(request: Any) -> str:
    """Whose turn a drawing takes: the login's, or where there is none that of an open page at its address."""
    return Access.turn(request.state.caller, owner_of(request))


Asked = tuple[str | None, Request]
"""A request, and the name of the model that is to draw it; None is the first."""
Preview = Callable[[], list[Image.Image]]


@dataclass(eq=False)
class Drawing:
    """What one person asked for, from the click to the last picture. Several may look on, one after another.

    It is kept for a while, so it holds no engine: models: the names of those that draw its requests; ahead: of the
    queue before it; advice: what to know of the prompts; given: what its tab was filled with, by component."""

    requests: Sequence[Request]
    page: str  # the open page that looks on; another after a reload
    models: Sequence[str]
    advice: list[str]
    given: Mapping[Any, Any] = field(default_factory=dict)
    futures: list[Future[Pictures]] = field(default_factory=list)
    ahead: Callable[[], int] = lambda: 0
    steps: list[tuple[int, int, Preview | None]] = field(init=False)  # (step, total, look) of each request
    paces: deque[tuple[float, float]] = field(init=False)  # (when, share), of late
    changed: Condition = field(default_factory=Condition)
    left: float | None = None  # when the page was closed
    ended: float | None = None
    onlooker: object = None  # who looks on now

    def __post_init__(self) -> None:
        self.steps = [(0, 1, None)] * len(self.requests)
        self.paces = deque(
            [(time.monotonic(), 0.0)], maxlen=8 * len(self.requests)
        )  # as each reports its steps

    @property
    def count(self) -> int:
        """How many pictures are asked for."""
        return sum(request.num_images for request in self.requests)

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return sum(step / total for step, total, _ in self.steps) / len(self.steps)

    @property
    def cancelled(self) -> bool:
        """Whether somebody stopped it."""
        return any(future.cancelled() for future in self.futures)

    def cancel(self) -> bool:
        """Stop it within a step; whether there was anything to stop."""
        return any([future.cancel() for future in self.futures])

    def report(self, which: int, step: int, total: int, preview: Preview) -> bool:
        """The engine's on_step of a request; gives up a drawing whose page is closed for too long."""
        with self.changed:
            ended = which < len(self.futures) and self.futures[which].done()
            self.steps[which] = step, total, None if ended else preview
            self.paces.append((time.monotonic(), self.share))
            self.changed.notify_all()
        return self.left is not None and time.monotonic() > self.left + PATIENCE

    def settle(self, which: int, future: Future[Pictures]) -> None:
        """A future's callback: the drawing ends with the last of them, and with the first that gave no pictures."""
        with self.changed:
            self.steps[which] = *self.steps[which][:2], None
            if all(one.done() for one in self.futures):
                self.ended, self.ahead = time.monotonic(), lambda: 0
            self.changed.notify_all()
        if future.cancelled() or future.exception() is not None:
            self.cancel()

    def pictures(self) -> list[Pictures]:
        """Of every request, once all have ended. Raises as `outcome` does, and Cancelled where it was stopped."""
        for future in self.futures:
            if not future.cancelled():
                outcome(future)  # what failed tells more than what was stopped for it
        if self.cancelled:
            raise Cancelled("stopped")
        return [future.result() for future in self.futures]

    def seconds_left(self) -> float:
        """By the pace of the last steps: it changes with the company."""
        (first, share), (last, now) = self.paces[0], self.paces[-1]
        return (last - first) / max(now - share, 1e-6) * (1 - now)

    def look(self) -> list[Image.Image | None]:
        """Every picture as it is now; of a flagged prompt blurred: to see those is for the end, by choice."""
        seen: list[Image.Image | None] = []
        for request, future, (_, _, preview) in zip(self.requests, self.futures, self.steps, strict=True):
            images: list[Any] = [*preview()] if preview else []
            if future.done() and not future.cancelled() and future.exception() is None:
                ended = future.result()
                images = [*map(blurred, ended.images)] if ended.flagged else ended.images
            seen += images + [None] * (request.num_images - len(images))
        return seen

    def pixels(self) -> int:
        """Of all pictures that it holds: those drawn, and those given."""
        ended = [future for future in self.futures if future.done() and not future.cancelled()]
        drawn = [future.result().images for future in ended if future.exception() is None]
        started = [
            (start.picture, start.mask) for start in (request.start for request in self.requests) if start
        ]
        return _pixels([drawn, started, *self.given.values()])


def _pixels(held: Any) -> int:
    if isinstance(held, Image.Image):
        return held.width * held.height
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(map(_pixels, parts))


class Lane:
    """Drawings of open pages. Each is known by its owner, so nobody can stop, or see, another's.

    runs: the long ones, trainings and batches. pipe: the first model's, after which pages are laid out. metadata:
    whether files of pictures tell how they were made."""

    def __init__(self, models: Models, runs: Runs | None = None, metadata: bool = True):
        self.models, self.pipe, self.metadata = models, models.first.pipe, metadata
        self.runs = runs or Runs()
        self.person: Any = None  # the component that knows whose page it is
        self.model: Any = None  # the picker of models
        self.ticket: Any = None  # the one that knows the browser's tab
        self.opened: list[Callable[[Any], None]] = []  # each adds what follows when a page has been opened
        self.pickers: dict[str, Any] = {}  # of adapters, by tab
        self._drawings: dict[str, Drawing] = {}

    def start(
        self,
        owner: str,
        asked: Sequence[Asked],
        page: str = "",
        turn: str = "",
        given: Mapping[Any, Any] | None = None,
    ) -> Drawing:
        """Queue the owner's next drawing, which takes the place of the last one. Raises one of REFUSED at once.

        Its requests are drawn side by side, and share network calls. turn: whose turn they take, as `turn_of` has it;
        "" for the owner's own. given: as of `Drawing`."""
        self._sweep()
        engines = [self.models.engine(model) for model, _ in asked]
        requests = [request for _, request in asked]
        old = self._drawings.get(owner)
        if old is not None and old.ended is None:
            old.cancel()  # its place is free
        elif self.busy >= AT_ONCE:
            raise QueueFull(f"{self.busy} people are drawing: try again a little later", 5.0)
        names = [engine.pipe.model_name for engine in engines]
        drawing = Drawing(requests, page, names, _advice(engines, requests), given or {})
        try:
            for k, (engine, request) in enumerate(zip(engines, requests, strict=True)):
                drawing.futures.append(engine.submit(request, turn or owner, partial(drawing.report, k)))
        except BaseException:
            drawing.cancel()
            raise
        drawing.ahead = partial(engines[0].ahead, drawing.futures[0])
        for k, future in enumerate(drawing.futures):
            future.add_done_callback(partial(drawing.settle, k))
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

    def watch(self, drawing: Drawing) -> Iterator[Waiting | Step | list[Pictures]]:
        """How it goes, as it goes, and the pictures of every request at last. Who stops looking on stops nothing.

        It ends without pictures when another begins to look on. Raises as `Drawing.pictures` does.
        """
        seen, place, looks = 0.0, None, -1
        me = drawing.onlooker = object()
        while drawing.ended is None:
            if drawing.onlooker is not me:
                return
            with drawing.changed:
                if drawing.ended is None and drawing.share <= seen:
                    drawing.changed.wait(LOOK)
                share, (step, total, _) = drawing.share, drawing.steps[0]
                left = drawing.seconds_left()
            if share > seen:
                look = int(share * (PREVIEWS + 1) + 1e-9)  # a new one is due each time that this grows
                show = drawing.look() if looks < look and share < 1 else None
                seen, looks = share, look
                if len(drawing.requests) > 1:
                    step, total = round(100 * share), 100
                yield Step(step, total, left, show)
            elif not seen and (ahead := drawing.ahead()) != place:
                place = ahead
                yield Waiting(ahead)
        yield drawing.pictures()

    def cancel(self, owner: str) -> bool:
        """Stop the owner's drawing, running or waiting, within a step; whether there was one."""
        drawing = self._drawings.get(owner)
        return drawing is not None and drawing.cancel()

    def forget(self, owner: str) -> None:
        """Keep the owner's last drawing no longer."""
        self._drawings.pop(owner, None)

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
                drawing.cancel()
        drawings = [*self._drawings.items()]
        ended = [(d.left or now, d.ended, owner, d) for owner, d in drawings if d.ended is not None]
        room = MOST_KEPT
        for left, end, owner, drawing in sorted(ended, key=lambda one: one[:2], reverse=True):
            room -= drawing.pixels()
            if room < 0 or now > min(left + KEPT, end + OPEN):
                self._drawings.pop(owner, None)


def _advice(engines: Sequence[Engine], requests: Sequence[Request]) -> list[str]:
    """What to know of the prompts, each word of it once."""
    told = []
    for engine, asked in zip(engines, requests, strict=True):
        task = Task(asked.prompt, asked.negative_prompt, asked.seed)
        told += engine.pipe.advice([task], [name for name, _ in asked.loras])
    return [*dict.fromkeys(told)]
