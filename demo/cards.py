"""The studio's own HTML: header, stage, progress and examples. Every text from outside is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape

from PIL import Image

from .theme import MARK

PREVIEW_SIZE = 512
"""Longest side of a preview in pixels: previews are looks, not results."""

EXAMPLES: list[tuple[str, str]] = [
    ("a red apple", "Name one thing. Nothing behind it: the picture is truly transparent."),
    (
        "a flat emoji of a smiling cat",
        "Begin with a style: flat emoji, 3D emoji, clip art, sticker.",
    ),
    ("a 3D emoji of a rocket on a sky blue background", "End with a background and its colour."),
    ("a black stencil icon of a crown", "One-colour icons take the colour of their ink."),
    ("a clip art of a lighthouse, sea, rocks", "Add a few keywords for what belongs in it."),
    (
        "a round emoji of a ghost on a purple background",
        "Draw four, keep the seed of the best, go on from there.",
    ),
]


def header(name: str, facts: Sequence[str]) -> str:
    """The masthead: mark, name, and what the loaded model is."""
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<div class="mast">{MARK}<h1>{escape(name)}</h1><ul aria-label="Model">{chips}</ul></div>'


def examples() -> str:
    """Prompts to click, each with what it teaches."""
    cards = "".join(
        f'<li><button type="button" data-value="{escape(prompt)}"><b>{escape(prompt)}</b>'
        f"<span>{escape(lesson)}</span></button></li>"
        for prompt, lesson in EXAMPLES
    )
    return f'<h2 class="small-title">How to ask</h2><ul class="lessons">{cards}</ul>'


def empty() -> str:
    """The stage before the first picture."""
    return (
        '<div class="stage empty"><div class="board"></div>'
        "<p><b>Your pictures appear here.</b><br>"
        "The checkerboard is nothing at all: it shows where a picture is transparent.</p></div>"
    )


def drawing(previews: Sequence[Image.Image], count: int) -> str:
    """The stage while it draws: the latest previews, or blank frames before the first."""
    if previews:
        frames = [f'<img src="{_webp(image)}" alt="Preview {i}">' for i, image in enumerate(previews, 1)]
    else:
        frames = [""] * count
    body = "".join(f'<li class="card"><div class="board wet">{frame}</div></li>' for frame in frames)
    return f'<ul class="stage grid n{len(frames)}" aria-busy="true">{body}</ul>'


def results(prompt: str, pictures: Sequence[bytes], seeds: Sequence[int], flagged: bool = False) -> str:
    """The finished pictures, each with its seed, a download of the very PNG, and its seed to go on from.

    Flagged ones are blurred until their own "Show anyway" is ticked.
    """
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    cards = [_card(prompt, name, data, seed, flagged) for data, seed in zip(pictures, seeds, strict=True)]
    return f'<ul class="stage grid n{len(cards)}">{"".join(cards)}</ul>'


def _card(prompt: str, name: str, data: bytes, seed: int, flagged: bool) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    alt = f"{escape(prompt)}, seed {seed}"
    veil = '<label class="veil"><input type="checkbox"> Show anyway</label>' if flagged else ""
    return (
        f'<li class="card"><figure><div class="board"><img src="{source}" alt="{alt}">{veil}</div>'
        f'<figcaption><span class="seed">seed {seed}</span>'
        f'<button type="button" data-value="{seed}" aria-label="Keep seed {seed}">Keep seed</button>'
        f'<a href="{source}" download="{name}-{seed}.png" aria-label="Download PNG, seed {seed}">PNG</a>'
        "</figcaption></figure></li>"
    )


def progress(step: int, total: int, seconds_left: float | None) -> str:
    """The progress line: a bar, the step, and what is left."""
    if not step:
        words = "Starting …"
    elif step >= total:
        words = f"Step {step} of {total}"
    else:
        words = f"Step {step} of {total} · {_seconds(seconds_left)} left"
    share = 100 * step / total if total else 0
    return (
        f'<div class="progress"><div class="bar" role="progressbar" aria-label="Drawing" aria-valuemin="0" '
        f'aria-valuemax="{total}" aria-valuenow="{step}"><i style="width:{share:.1f}%"></i></div>'
        f"<p>{escape(words)}</p></div>"
    )


def note(text: str, kind: str = "plain") -> str:
    """One quiet line under the stage; `kind` is plain or warn."""
    return f'<p class="note {kind}">{escape(text)}</p>' if text else ""


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min"


def _webp(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
