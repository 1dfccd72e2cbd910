"""X/Y grids: how axes are read, what every picture is drawn with, and the sheet."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusionfm.sheets import AXES, CELL, draw_sheet, parse_axis, plan_grid

BASE = {"prompt": "a red cat", "seed": 3, "guidance": 4.0}


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("steps", "4, 8,20", (4, 8, 20)),
        ("steps", "4-12:4", (4, 8, 12)),
        ("seed", "7-9", (7, 8, 9)),
        ("seed", str(2**60 + 1), (2**60 + 1,)),
        ("guidance", "1, 2.5, 1", (1.0, 2.5)),
        ("strength", "0.5-0.9:0.2", (0.5, 0.7, 0.9)),
        ("prompt", " cat ,  red  fox\ndog", ("cat", "red fox", "dog")),
    ],
)
def test_axes_are_read_as_people_write_them(name, text, values):
    axis = parse_axis(name, text)
    assert axis.values == values and len(axis.labels) == len(values)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sampler", "euler", "use prompt, style"),
        ("steps", "", "0 values: give from 1 to 12"),
        ("steps", "1-40", "40 values"),
        ("steps", "1-1000000000", "at most 49 steps"),
        ("steps", "9-1", "must rise"),
        ("steps", "1.5", "no number: give whole numbers"),
        ("steps", "many", "no number"),
        ("steps", "0", "steps must be from 1"),
        ("guidance", "nan", "guidance must be"),
        ("guidance", "99", "guidance must be"),
        ("strength", "0", "strength must be"),
        ("seed", "-1", "seed must be"),
        ("size", "128", "width x height"),
    ],
)
def test_values_that_cannot_be_drawn_are_refused(name, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_axis(name, text)
    assert "\n" not in str(caught.value)


def test_every_picture_has_its_pair_of_values_row_by_row():
    cells = plan_grid(BASE, parse_axis("steps", "4, 8"), parse_axis("prompt", "cat, dog, fox"))
    assert [(cell["prompt"], cell["steps"]) for cell in cells] == [
        (f"a red {animal}", steps) for animal in ("cat", "dog", "fox") for steps in (4, 8)
    ]
    assert all(cell["seed"] == 3 and set(cell) == {*BASE, "steps"} for cell in cells)
    assert [cell["seed"] for cell in plan_grid(BASE, parse_axis("seed", "1-3"))] == [1, 2, 3]


def test_pickers_and_search_work_together():
    cells = plan_grid(
        BASE | {"background": "blue"},
        parse_axis("style", "sticker, flat emoji"),
        parse_axis("prompt", "cat, owl"),
    )
    assert cells[-1] == {
        "prompt": "a flat emoji of a red owl on a blue background",
        "seed": 3,
        "guidance": 4.0,
    }
    clear = plan_grid(BASE, parse_axis("background", "transparent, teal"))
    assert [cell["prompt"] for cell in clear] == ["a red cat", "a red cat on a teal background"]


def test_settings_that_the_caller_resolves_are_left_as_they_are_named():
    cells = plan_grid(
        BASE | {"weight": 1.0}, parse_axis("weight", "0, 0.5"), parse_axis("model", "icons, clouds")
    )
    assert [(cell["model"], cell["weight"]) for cell in cells] == [
        ("icons", 0.0), ("icons", 0.5), ("clouds", 0.0), ("clouds", 0.5),
    ]  # fmt: skip
    sized = plan_grid(
        BASE, parse_axis("size", "128x128, 160 × 96"), parse_axis("leave out", "nothing, a leaf")
    )
    assert [(cell["width"], cell["height"], cell["negative_prompt"]) for cell in sized] == [
        (128, 128, ""), (160, 96, ""), (128, 128, "a leaf"), (160, 96, "a leaf"),
    ]  # fmt: skip
    assert parse_axis("adapter", "none, rings").labels == ("adapter none", "adapter rings")


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (("steps", "1-3"), ("steps", "4-6"), "both axes are steps"),
        (("steps", "1-8"), ("seed", "1-7"), "56 pictures are too many"),
        (("prompt", "dog, cat"), None, "does not say 'dog'"),
    ],
)
def test_grids_that_make_no_sense_are_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        plan_grid(BASE, parse_axis(*x), parse_axis(*y) if y else None)


def test_the_sheet_has_every_picture_in_its_place():
    colors = [
        (250, 0, 0, 255),
        (0, 250, 0, 255),
        (0, 0, 250, 255),
        (250, 250, 0, 255),
        (0, 250, 250, 255),
        (9, 9, 9, 255),
    ]
    images = [Image.new("RGBA", (32, 32), color) for color in colors]
    x, y = parse_axis("steps", "1, 2, 3"), parse_axis("prompt", "cat, a dog of a very long name indeed it is")
    sheet = draw_sheet(images, x, y, {"seed": 3})
    left = sheet.width - 20 - 3 * CELL - 20
    centers = [
        sheet.getpixel((left + column * (CELL + 10) + CELL // 2, 20 + 34 + row * (CELL + 10) + CELL // 2))
        for row in (0, 1)
        for column in (0, 1, 2)
    ]
    assert centers == [color[:3] for color in colors]
    labels = np.asarray(sheet)[20:50].min()
    assert labels < 100  # something is written above
    with pytest.raises(ValueError, match="5 pictures do not fill a grid of 3 x 2"):
        draw_sheet(images[:5], x, y)
    assert set(AXES) >= {"prompt", "style", "background", "seed", "steps", "guidance", "strength", "weight"}
