"""Several requests drawn together for a tab, and the HTML of how far they are and of what they gave."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from html import escape
from queue import SimpleQueue
from typing import Any

import gradio as gr

from diffusionfm.drawing import Pictures
from diffusionfm.serve.jobs import Request

from .cards import VEIL
from .lane import REFUSED, Lane

TAKE = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-take]');
  if (button) trigger('click', {value: button.closest('figure').querySelector('img').src});
});"""
"""Tells Python of a picture's button with the picture itself, as a data URL."""
LAST = "() => document.querySelector('#stage .card img')?.src ?? ''"
"""The first picture on Create's stage, as a data URL; empty where there is none."""
MAX_URL = 2**23


@dataclass(frozen=True)
class Progress:
    """How far all requests are together: the share of the steps done, and the seconds still expected."""

    share: float
    seconds_left: float


def draw_all(lane: Lane, owner: str, requests: Sequence[Request]) -> Iterator[Progress | list[Pictures]]:
    """Draw requests side by side: yields `Progress`, then the pictures of each, in their order.

    The engine lets them share network calls. Whatever it raises is raised here, for people. Leaving the iterator early,
    as Gradio does for Cancel and for a closed page, stops them all within a step.
    """
    events: SimpleQueue[Any] = SimpleQueue()
    shares, began = [0.0] * len(requests), time.monotonic()
    futures: list[Future[Pictures]] = []
    try:
        for k, request in enumerate(requests):
            futures.append(lane.engine.submit(request, owner, _teller(events, k)))
            futures[-1].add_done_callback(lambda future: events.put(None))
        while not all(future.done() for future in futures):
            for told in _drain(events):
                shares[told[0]] = told[1]
            share = sum(shares) / len(shares)
            yield Progress(share, (time.monotonic() - began) * (1 - share) / max(share, 1e-3))
        yield [future.result() for future in futures]
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
    """What was told since the last look; waits for something."""
    event = events.get()
    while True:
        if event is not None:
            yield event
        if events.empty():
            return
        event = events.get()


def bar(now: Progress, count: int) -> str:
    """The progress line of `count` pictures."""
    per_cent, seconds = round(100 * now.share), max(1, round(now.seconds_left))
    left = f" · about {seconds} s left" if now.share else ""
    words = f"{'One picture' if count == 1 else f'{count} pictures'} · {per_cent} %{left}"
    return (
        f'<div class="progress"><div class="bar" role="progressbar" aria-label="Drawing" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{per_cent}"><i style="width:{per_cent}%"></i></div><p>{words}</p></div>'
    )


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
            f'<a href="{source}" download="{file_stem(name)}-{seed}.png" aria-label="Download PNG, seed {seed}">PNG</a>'
            "</figcaption></figure></li>"
        )
    return f'<ul class="stage grid n{len(items)}">{"".join(items)}</ul>'


def blank(count: int) -> str:
    """The stage while it draws."""
    frames = '<li class="card"><div class="board wet"></div></li>' * count
    return f'<ul class="stage grid n{count}" aria-busy="true">{frames}</ul>'


def empty(title: str, words: str) -> str:
    """A stage with nothing on it yet, and what to do about that."""
    return f'<div class="stage empty"><div class="board"></div><p><b>{escape(title)}</b><br>{escape(words)}</p></div>'


def line(text: str) -> str:
    """A quiet line under the stage."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def data_url(data: bytes) -> str:
    """A PNG file as a URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def bytes_of(url: str) -> bytes:
    """The PNG file of a data URL that a page sent back; ValueError for anything else, or over 8 MiB."""
    head, _, body = url[: MAX_URL + 1].partition(",")
    if head != "data:image/png;base64" or len(url) > MAX_URL:
        raise ValueError("there is no picture yet: draw one in Create first, or upload one")
    return base64.b64decode(body, validate=True)


def file_stem(name: str) -> str:
    """A name for files, from any words."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "picture"
