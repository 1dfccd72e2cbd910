"""X/Y grids: two settings, a picture for every pair of their values, and the labelled sheet of them.

An axis is written as people write it elsewhere: "4, 8, 20" or "0.5-0.9:0.1" for numbers (from-to:step), words with
commas between them for others, "128x128, 160x96" for sizes, and for the prompt "cat, dog, fox": the first is searched
for, each is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffusionfm.checks import check_prompt, check_seed, check_settings
from diffusionfm.images import checkerboard
from diffusionfm.inputs import contain
from diffusionfm.phrasing import in_style, on_background

MOST = 49
"""Pictures of a sheet at most."""
MOST_VALUES = 12
CELL, GAP, MARGIN = 160, 10, 20

NOTHING = "nothing"
"""The word of the axis "leave out" for no word at all: commas have nothing between them."""

Settings = dict[str, Any]
"""The keywords of serve.jobs.Request, and some for the caller to resolve: strength, model, adapter and weight."""


@dataclass(frozen=True)
class Axis:
    """A setting and the values it takes; `labels` say them in words."""

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


def _numbers(text: str, whole: bool) -> list[Any]:
    """Of "1, 2, 5" or "1-9:2", both ends among them where the steps meet them; ValueError for other words."""
    found: list[Any] = []
    for part in _parts(text):
        span = re.fullmatch(r"([0-9.]+)\s*-\s*([0-9.]+)(?:\s*:\s*([0-9.]+))?", part)
        try:
            if span is None:
                found.append(int(part) if whole else float(part))
                continue
            low, high, step = float(span[1]), float(span[2]), float(span[3] or 1)
        except ValueError as error:
            kind = "whole numbers" if whole else "numbers"
            raise ValueError(f"{part!r} is no number: give {kind} as in 4, 8, 20 or 1-9:2") from error
        if step <= 0 or high < low or (high - low) / step > MOST:
            raise ValueError(f"{part!r} must rise in at most {MOST} steps: write from-to:step, as in 1-9:2")
        values = [round(low + k * step, 6) for k in range(int((high - low) / step + 1e-9) + 1)]
        found += [int(value) for value in values] if whole else values
    return found


def _parts(text: str) -> list[str]:
    return [part for part in (" ".join(part.split()) for part in re.split(r"[,\n]", text)) if part]


def _checked(name: str) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        values = _numbers(text, whole=name == "steps")
        for value in values:
            check_settings(**{name: value})
        return values

    return read


def _seeds(text: str) -> list[int]:
    return [check_seed(value) for value in _numbers(text, whole=True)]


def _words(text: str) -> list[str]:
    return [check_prompt(part) for part in _parts(text)]


def _sizes(text: str) -> list[str]:
    sizes = [re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", part) for part in _parts(text)]
    if not all(sizes):
        raise ValueError(f"{text!r} is no list of sizes: give width x height as in 128x128, 160x96")
    return [f"{size[1]} × {size[2]}" for size in sizes if size]


AXES: dict[str, Callable[[str], list[Any]]] = {
    "prompt": _words,
    "style": _words,
    "background": _words,
    "leave out": _words,
    "seed": _seeds,
    "steps": _checked("steps"),
    "guidance": _checked("guidance"),
    "size": _sizes,
    "strength": _checked("strength"),
    "model": _words,
    "adapter": _words,
    "weight": lambda text: _numbers(text, whole=False),
}
"""The settings that an axis may stand for, and what reads its values; "weight" is the adapter's."""


WORDS = ("prompt", "style", "background", "size")
"""Axes whose values tell by themselves what they are."""


def parse_axis(name: str, text: str) -> Axis:
    """An axis of 1 to 12 values. ValueError, with the fix in it, for an unknown setting or values it cannot take."""
    if name not in AXES:
        raise ValueError(f"no axis {name!r}: use {', '.join(AXES)}")
    values = list(dict.fromkeys(AXES[name](text)))
    if not 1 <= len(values) <= MOST_VALUES:
        raise ValueError(f"the axis {name} has {len(values)} values: give from 1 to {MOST_VALUES}")
    named = "" if name in WORDS else f"{name} "
    labels = tuple(named + (value if isinstance(value, str) else f"{value:g}") for value in values)
    return Axis(name, tuple(values), labels)


def plan_grid(base: Settings, x: Axis, y: Axis | None = None) -> list[Settings]:
    """The settings of every picture, row by row: `base` with the values of x and y in it.

    "style" and "background" become words of "prompt", "leave out" the negative prompt, "size" width and height.
    ValueError for two axes of one setting, over 49 pictures, or words to search for that the prompt does not have.
    """
    if y is not None and x.name == y.name:
        raise ValueError(f"both axes are {x.name}: choose two settings, or leave one out")
    count = len(x.values) * (len(y.values) if y else 1)
    if count > MOST:
        raise ValueError(f"{count} pictures are too many for a sheet: {MOST} at most, so give fewer values")
    cells = []
    for row in y.values if y else (None,):
        for column in x.values:
            chosen = dict(base)
            for axis, value in ((x, column), (y, row)):
                if axis is not None:
                    _put(chosen, axis, value)
            cells.append(_composed(chosen))
    return cells


def _put(settings: Settings, axis: Axis, value: Any) -> None:
    if axis.name == "prompt":
        sought = axis.values[0]
        if sought not in settings["prompt"]:
            raise ValueError(
                f"the prompt does not say {sought!r}: begin the axis with words that are to be replaced"
            )
        settings["prompt"] = settings["prompt"].replace(sought, value)
    elif axis.name == "leave out":
        settings["negative_prompt"] = "" if value == NOTHING else value
    elif axis.name == "size":
        settings["width"], settings["height"] = map(int, value.split(" × "))
    else:
        settings[axis.name] = value


def _composed(settings: Settings) -> Settings:
    """The settings with style and background said in the prompt, as captions say them."""
    style, background = settings.pop("style", ""), settings.pop("background", "")
    if style:
        settings["prompt"] = in_style(style, settings["prompt"])
    if background and background != "transparent":
        settings["prompt"] += on_background(background)
    return settings


def draw_sheet(
    images: Sequence[Image.Image], x: Axis, y: Axis | None, facts: Mapping[str, Any] | None = None
) -> Image.Image:
    """One RGB picture of a grid's pictures, row by row, on checkerboards: x labels above, y labels at the left.

    facts: what all of them have in common, written below.
    """
    columns, rows = len(x.values), len(y.values) if y else 1
    if len(images) != columns * rows:
        raise ValueError(f"{len(images)} pictures do not fill a grid of {columns} x {rows}")
    font = ImageFont.load_default(size=13)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    side = MARGIN
    if y is not None:
        side += min(CELL, round(max(ruler.textlength(label, font=font) for label in y.labels)) + GAP)
    head, foot = 34, 34 if facts else 0
    width = max(side + columns * (CELL + GAP) - GAP + MARGIN, 320)
    sheet = Image.new("RGB", (width, MARGIN + head + rows * (CELL + GAP) + foot), "white")
    pen = ImageDraw.Draw(sheet)
    for k, label in enumerate(x.labels):
        middle = side + k * (CELL + GAP) + CELL // 2
        pen.text(
            (middle, MARGIN + head // 2), _cut(label, CELL, font), fill="#333333", font=font, anchor="mm"
        )
    for k, image in enumerate(images):
        left, top = side + k % columns * (CELL + GAP), MARGIN + head + k // columns * (CELL + GAP)
        sheet.paste(checkerboard(contain(image.convert("RGBA"), CELL, CELL)), (left, top))
        if y is not None and k % columns == 0:
            label = _cut(y.labels[k // columns], CELL, font)
            pen.text((MARGIN, top + CELL // 2), label, fill="#333333", font=font, anchor="lm")
    if facts:
        words = " · ".join(f"{name} {value}" for name, value in facts.items())
        pen.text(
            (MARGIN, sheet.height - 24), _cut(words, width - 2 * MARGIN, font), fill="#777777", font=font
        )
    return sheet


def _cut(label: str, width: int, font: Any) -> str:
    """The label, cut to a width in pixels; the built-in font has Latin letters alone."""
    while label and font.getlength(label) > width:
        label = label[:-2].rstrip() + "…" if len(label) > 2 else ""
    return label
