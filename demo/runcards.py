"""The HTML of long runs: what was uploaded, how far it is, its curves, sheets and pictures. Texts are escaped."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .cards import webp

SHEET_SIZE = (1600, 16_000)
"""Pixels that a sheet is sent with at most; WebP ends at 16,383."""
SHOWN_FAULTS = 8


def lines(title: str, texts: Sequence[str], faults: Sequence[str] = ()) -> str:
    """A report: plain lines, then what is amiss, the first few of it in sight."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    items += "".join(f'<li class="amiss">{escape(text)}</li>' for text in faults[:SHOWN_FAULTS])
    if len(faults) > SHOWN_FAULTS:
        items += f'<li class="amiss">and {len(faults) - SHOWN_FAULTS} more</li>'
    return f'<section class="report"><h3>{escape(title)}</h3><ul>{items}</ul></section>'


def left(seconds: float | None) -> str:
    """What is left of the time, in words."""
    if seconds is None:
        return ""
    return f" · about {seconds:.0f} s left" if seconds < 90 else f" · about {seconds / 60:.0f} min left"


def curves(svg: str) -> str:
    """The losses, drawn by the library."""
    if not svg:
        return ""
    told = "Loss by step: lower is closer to your pictures. The dashed line is the step that is kept."
    return f'<figure class="curves">{svg}<figcaption>{told}</figcaption></figure>'


def sheet(file: Path, caption: str) -> str:
    """A contact sheet or a sample sheet; on a phone it is moved sideways under the finger."""
    alt = escape(caption)
    with Image.open(file) as picture:
        shown = webp(picture.convert("RGB"), SHEET_SIZE)
    return (
        f'<figure class="sheetshot"><div tabindex="0" role="group" aria-label="{alt}">'
        f'<img src="{shown}" alt="{alt}"></div><figcaption>{alt}</figcaption></figure>'
    )


def pictures(found: Sequence[tuple[str, bytes]]) -> str:
    """Small pictures with their prompts."""
    cards = "".join(
        f'<li class="card"><figure><div class="board"><img src="{_small(data)}" alt="{escape(prompt)}"></div>'
        f"<figcaption>{escape(prompt)}</figcaption></figure></li>"
        for prompt, data in found
    )
    return f'<ul class="stage grid few">{cards}</ul>' if cards else ""


def _small(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as picture:
        return webp(picture.convert("RGBA"), (192, 192))
