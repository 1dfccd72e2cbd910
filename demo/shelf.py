"""Tabs whose drawing lasts as long as its event: requests drawn together, how far they are, and what they gave."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from queue import Empty, SimpleQueue
from typing import Any

import gradio as gr

from diffusionfm.drawing import Pictures
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request

from .cards import VEIL, bar, data_url, note, waiting
from .controls import QUIET, SHOWN
from .lane import LOOK, REFUSED, Lane, Update, Waiting, outcome
from .request import file_name

VEILED = "veiled"
TAKE = """element.addEventListener('click', event => {
  const card = event.target.closest('button[data-take]')?.closest('.card');
  if (!card) return;
  const veiled = card.querySelector('.veil input:not(:checked)');
  trigger('click', {value: veiled ? 'veiled' : card.querySelector('img').src});
});"""
"""Tells Python of a picture's button with the picture itself, as a data URL, or `VEILED` for one that is blurred."""
LAST = """(url, model) => {
  const card = document.querySelector('#stage .card:has(img)');
  const veiled = card?.querySelector('.veil input:not(:checked)');
  return [veiled ? 'veiled' : card?.querySelector('img').src ?? '', model];
}"""
"""The first picture on Create's stage in the same way, empty where there is none, before the chosen model."""
MAX_URL = 2**23


class DrawTab:
    """A tab that draws what it is asked for in one event. at: its components, among them draw, cancel, stage, status,
    said, seed and adapter. A subclass says what is asked for, and what is made of the pictures."""

    def __init__(self, lane: Lane, at: Any):
        self.lane, self.at = lane, at

    def draw(self, *asked: Any) -> Iterator[Update]:
        """The drawing: progress, then the pictures."""
        raise NotImplementedError

    def wire(self, triggers: list[Any], asked: list[Any]) -> None:
        """Connect drawing and Cancel. `draw` is given the person, model, adapter and weight before what is `asked`."""
        at = self.at
        who = [self.lane.person, self.lane.model.choice, at.adapter.choice, at.adapter.weight]
        seen = [at.stage, at.status, at.said, at.draw, at.cancel, at.seed]
        once: dict[str, Any] = {"trigger_mode": "once", "concurrency_limit": None}  # the engine refuses
        drawing = gr.on(triggers, self.draw, [*who, *asked], seen, **once, **SHOWN)
        drawing.failure(self.clear, None, seen, **QUIET)
        at.cancel.click(self.cancelled, None, seen, cancels=[drawing], **QUIET)

    def busy(self, said: str) -> Update:
        """While it draws."""
        at, said = self.at, " ".join(filter(None, [said, self.lane.runs.company()]))
        return {at.said: said, at.draw: gr.Button(interactive=False), at.cancel: gr.Button(interactive=True)}

    def progress(self, event: Waiting | Progress, count: int) -> Update:
        """The place in the queue or how far `count` pictures are, and what takes its share meanwhile."""
        line = waiting(event.ahead) if isinstance(event, Waiting) else event.shown(count)
        return {self.at.status: line + note(self.lane.runs.company(), "warn")}

    def rest(self) -> Update:
        """Ready for the next drawing."""
        at = self.at
        return {at.status: "", at.draw: gr.Button(interactive=True), at.cancel: gr.Button(interactive=False)}

    def clear(self) -> Update:
        """After a drawing that gave nothing."""
        return self.rest()

    def cancelled(self) -> Update:
        """After Cancel, which left the drawing's iterator."""
        return self.clear() | {self.at.status: note("Cancelled."), self.at.said: "Cancelled."}


@dataclass(frozen=True)
class Progress:
    """How far all requests are together: the share of the steps done, and the seconds still expected."""

    share: float
    seconds_left: float

    def shown(self, count: int) -> str:
        """The progress line of `count` pictures."""
        per_cent, seconds = round(100 * self.share), max(1, round(self.seconds_left))
        pictures = "One picture" if count == 1 else f"{count} pictures"
        return bar(per_cent, 100, f"{pictures} · {per_cent} % · about {seconds} s left")


def draw_all(
    engine: Engine, turn: str, requests: Sequence[Request]
) -> Iterator[Waiting | Progress | list[Pictures]]:
    """Draw requests side by side: yields `Waiting` and `Progress`, then the pictures of each, in their order.

    The engine lets them share network calls. Whatever it raises is raised here, for people. Leaving the iterator early,
    as Gradio does for Cancel and for a closed page, stops them all within a step; it can do so between two events
    alone, so there is one every LOOK seconds.
    """
    events: SimpleQueue[Any] = SimpleQueue()
    shares, began = [0.0] * len(requests), time.monotonic()
    futures: list[Future[Pictures]] = []
    try:
        for k, request in enumerate(requests):
            futures.append(engine.submit(request, turn, _teller(events, k)))
            futures[-1].add_done_callback(lambda future: events.put(None))
        while not all(future.done() for future in futures):
            for told in _drain(events):
                shares[told[0]] = told[1]
            if share := sum(shares) / len(shares):
                yield Progress(share, (time.monotonic() - began) * (1 - share) / share)
            else:
                began = time.monotonic()  # the wait tells nothing of the pace
                yield Waiting(engine.ahead(futures[0]))
        yield [outcome(future) for future in futures]
    except CancelledError as error:
        raise gr.Error("The drawing was stopped.", duration=6) from error
    except REFUSED as error:
        raise gr.Error(str(error), duration=10) from error
    finally:
        for future in futures:
            future.cancel()


def _teller(events: SimpleQueue[Any], k: int) -> Any:
    return lambda step, total, preview: events.put((k, step / total))


def _drain(events: SimpleQueue[Any]) -> Iterator[tuple[int, float]]:
    """What was told since the last look; waits for something, LOOK seconds at most."""
    with suppress(Empty):
        event = events.get(timeout=LOOK)
        while True:
            if event is not None:
                yield event
            event = events.get_nowait()


def shelf(
    files: Sequence[bytes], names: Sequence[str], seeds: Sequence[int], take: str = "", flagged: bool = False
) -> str:
    """PNG files over checkerboards, each to download; `take` is the label of a button that hands one on.

    Flagged ones are blurred until their own "Show anyway" is ticked."""
    items, veil = [], VEIL if flagged else ""
    for data, name, seed in zip(files, names, seeds, strict=True):
        source, shown = data_url(data), escape(name or "no prompt")
        more = (
            f'<button type="button" data-take aria-label="{take}, seed {seed}">{take}</button>'
            if take
            else ""
        )
        items.append(
            f'<li class="card"><figure><div class="board"><img src="{source}" alt="{shown}, seed {seed}">{veil}</div>'
            f'<figcaption><span class="seed">seed {seed}</span>{more}'
            f'<a href="{source}" download="{file_name(name, seed)}.png" aria-label="Download PNG, seed {seed}">PNG</a>'
            "</figcaption></figure></li>"
        )
    return f'<ul class="stage grid n{len(items)}">{"".join(items)}</ul>'


def bytes_of(url: str) -> bytes:
    """The PNG file of a data URL that a page sent back; ValueError for anything else, or over 8 MiB."""
    if url == VEILED:
        raise ValueError("the picture is blurred: tick its Show anyway first")
    head, _, body = url[: MAX_URL + 1].partition(",")
    if head != "data:image/png;base64" or len(url) > MAX_URL:
        raise ValueError("there is no picture yet: draw one in Create first, or upload one")
    return base64.b64decode(body, validate=True)
