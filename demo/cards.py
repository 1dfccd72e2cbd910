"""The studio's own HTML: header, stage, progress, history and examples. Every text from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from diffusionfm.images import format_a1111

from .request import file_name
from .theme import MARK

NAME = "DiffusionFM Studio"
PREVIEW_SIZE = (512, 512)
"""Pixels of a preview at most: previews are looks, not results."""

EMPTY = (
    "Your pictures appear here.",
    "The checkerboard is nothing at all: it shows where a picture is transparent.",
)
"""What is written on Create's stage before the first picture."""

VEIL = '<label class="veil"><input type="checkbox"> Show anyway</label>'
"""Beside a picture: blurs it until it is ticked."""

EXAMPLES: list[tuple[str, str]] = [
    ("a red apple", "Name one thing. Nothing behind it: the picture is truly transparent."),
    (
        "a flat emoji of a house",
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


def empty(title: str, words: str) -> str:
    """A stage with nothing on it yet, and what to do about that."""
    return f'<div class="stage empty"><div class="board"></div><p><b>{escape(title)}</b><br>{escape(words)}</p></div>'


def drawing(previews: Sequence[Image.Image | None], count: int, columns: int = 0) -> str:
    """The stage while it draws `count` pictures: the latest previews, blank frames for those not begun.

    columns: how many stand beside one another; 0 is what suits the count."""
    shown = [
        f'<img src="{webp(p, PREVIEW_SIZE)}" alt="Preview {i}">' if p else ""
        for i, p in enumerate(previews, 1)
    ]
    frames = shown + [""] * (count - len(shown))
    body = "".join(f'<li class="card"><div class="board wet">{frame}</div></li>' for frame in frames)
    wide = f' style="grid-template-columns: repeat({columns}, minmax(0, 1fr))"' if columns else ""
    return f'<ul class="stage grid n{len(frames)}" aria-busy="true"{wide}>{body}</ul>'


def results(pictures: Sequence[bytes], parameters: Sequence[Mapping[str, Any]], flagged: bool = False) -> str:
    """The finished pictures, PNG files, each with its seed and what one can do with it.

    Flagged ones are blurred until their own "Show anyway" is ticked.
    """
    cards = [
        _card(k, data, its, flagged) for k, (data, its) in enumerate(zip(pictures, parameters, strict=True))
    ]
    save = '<button type="button" data-value="zip">Download all, PNG and SVG, as a ZIP</button>'
    foot = f'<p class="foot">{save}</p>' if len(cards) > 1 else ""
    return f'<ul class="stage grid n{len(cards)}">{"".join(cards)}</ul>{foot}'


def _card(number: int, data: bytes, its: Mapping[str, Any], flagged: bool) -> str:
    source = data_url(data)
    prompt, seed = its["prompt"], its["seed"]
    name = f"{file_name(prompt, seed)}.png"
    acts = [
        (f'data-value="keep {seed}"', "Keep seed", "", "Draw with this seed again"),
        (f'data-copy="{escape(format_a1111(dict(its)))}"', "Copy", " settings", "To paste as a prompt"),
        (f'data-value="svg {number}"', "SVG", " download", "Traced in flat colours"),
    ]
    buttons = "".join(
        f'<button type="button" {act} title="{hint}" aria-label="{word}{more}, seed {seed}">{word}</button>'
        for act, word, more, hint in acts
    )
    veil = VEIL if flagged else ""
    picture = f'<img src="{source}" alt="{escape(prompt)}, seed {seed}">'
    return (
        f'<li class="card"><figure><div class="board">{picture}{veil}</div>'
        f'<figcaption><span class="seed">seed {seed}</span>{buttons}'
        f'<a href="{source}" download="{name}" aria-label="PNG download, seed {seed}">PNG</a>'
        "</figcaption></figure></li>"
    )


def veiled(flagged: Sequence[str]) -> list[str]:
    """A word about pictures that are blurred for these words of their prompts; none for none."""
    return [f"Blurred, for the prompt says {flagged[0]!r}: tick to show."] if flagged else []


def waiting(ahead: int) -> str:
    """The progress line before the first step."""
    return bar(0, 1, place(ahead) if ahead else "Starting …")


def place(ahead: int) -> str:
    """The place in the queue, in words."""
    return f"In the queue: {ahead} drawing{'s' * (ahead > 1)} of others before yours"


def progress(step: int, total: int, seconds_left: float, several: int = 0) -> str:
    """The progress line: a bar, the step, and what is left; of `several` pictures drawn together, per cent."""
    left = f" · {_seconds(seconds_left)} left" if step < total else ""
    return bar(
        step, total, (f"{several} pictures · {step} %" if several else f"Step {step} of {total}") + left
    )


def bar(done: int, total: int, words: str, label: str = "Drawing") -> str:
    """A progress line: how much of the total is done, and a word under it."""
    share = 100 * min(done, total) / total if total else 0
    return (
        f'<div class="progress"><div class="bar" role="progressbar" aria-label="{escape(label)}" aria-valuemin="0" '
        f'aria-valuemax="{total}" aria-valuenow="{done}"><i style="width:{share:.1f}%"></i></div>'
        f"<p>{escape(words)}</p></div>"
    )


def note(text: str, kind: str = "plain") -> str:
    """One quiet line under the stage, "" for none; `kind` is plain or warn."""
    return notes([text] if text else [], kind)


def notes(texts: Sequence[str], kind: str = "plain") -> str:
    """Quiet lines under the stage; `kind` is plain, or warn for sentences of the library."""
    if kind == "warn":
        texts = [f"{text[:1].upper()}{text[1:].removesuffix('.')}." for text in texts]
    return "".join(f'<p class="note {kind}">{escape(text)}</p>' for text in texts)


def history() -> str:
    """The list of what was drawn, which history.js fills."""
    return (
        '<section class="past" aria-labelledby="past"><header><h2 class="small-title" id="past">History</h2>'
        '<label><input type="checkbox" data-part="wanted"> Remember what I draw</label>'
        '<button type="button" data-part="clear" hidden>Clear</button></header>'
        "<p>In this browser alone, until you clear it or untick this. A picture brings its settings back.</p>"
        '<ul data-part="list"></ul></section>'
    )


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min"


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A file as a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def webp(image: Image.Image, size: tuple[int, int]) -> str:
    """A look at a picture, as a URL, no larger than that."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail(size)
    small.save(buffer, "WEBP", quality=80)
    return data_url(buffer.getvalue(), "image/webp")
