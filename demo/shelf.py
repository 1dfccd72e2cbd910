"""Finished pictures on a tab's stage, and those that a page hands back to be drawn from."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from .cards import VEIL, data_url
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
