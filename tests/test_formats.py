"""Formats: what a picture's file keeps, on which ground, at which size; what a trace looks like."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image, ImageDraw
from resvg_py import svg_to_bytes

from diffusionfm.formats import Finish, parse_color, pick_format, resized
from diffusionfm.images import on_background, read_parameters

PARAMETERS = {"prompt": 'a <red> & "blue" ring\0', "seed": 7, "steps": 3, "guidance": 4.0, "width": 96}


def ring(side: int = 96, hole: int = 20) -> Image.Image:
    """A red ring with a blue bar, antialiased, transparent around and in the middle; hidden colours are green."""
    large = Image.new("RGBA", (4 * side, 4 * side), (0, 255, 0, 0))
    draw = ImageDraw.Draw(large)
    draw.ellipse([16, 16, 4 * side - 17, 4 * side - 17], fill=(229, 57, 53, 255))
    draw.rectangle([2 * side - 30, 24, 2 * side + 30, 4 * side - 25], fill=(30, 136, 229, 255))
    middle = 2 * side
    draw.ellipse(
        [middle - 4 * hole, middle - 4 * hole, middle + 4 * hole, middle + 4 * hole], fill=(0, 255, 0, 0)
    )
    return large.resize((side, side), Image.Resampling.LANCZOS)


def rendered(svg: bytes, width: int | None = None) -> Image.Image:
    data = bytes(svg_to_bytes(svg_string=svg.decode(), width=width))
    return Image.open(io.BytesIO(data)).convert("RGBA")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", ["png", "webp"])
def test_pixels_and_parameters_come_back(name):
    image = ring()
    data = Finish(name).encode(image, PARAMETERS)
    with Image.open(io.BytesIO(data)) as back:
        assert back.format == name.upper() and back.tobytes() == image.tobytes()
    assert read_parameters(io.BytesIO(data)) == PARAMETERS
    assert Finish(name).encode(image, PARAMETERS) == data
    bare = Finish(name).encode(image)
    assert read_parameters(io.BytesIO(bare)) == {} and b"red" not in bare and b"xmp" not in bare.lower()
    dice = random.Random(0)
    for _ in range(200):  # damaged ones are read or refused, never a crash
        damaged = bytearray(data)
        damaged[dice.randrange(len(data))] = dice.randrange(256)
        with contextlib.suppress(ValueError):
            assert set(read_parameters(io.BytesIO(damaged))) <= set(PARAMETERS)
    with pytest.raises(FileNotFoundError):
        read_parameters("no-such-file.png")
    with pytest.raises(ValueError, match="unknown picture parameter"):
        Finish(name).encode(image, {"camera": "x"})


@pytest.mark.parametrize("name", ["png", "webp"])
def test_a_background_flattens_and_a_size_enlarges(name):
    image = ring()
    for background, color in (("sky blue", (0x90, 0xCA, 0xF9)), ("#f0c", (0xFF, 0x00, 0xCC))):
        finish = Finish(name, background, 200)
        assert finish.pixels(image) == (200, 200)
        with Image.open(io.BytesIO(finish.encode(image))) as flat:
            assert flat.mode == "RGB" and flat.size == (200, 200)
            assert flat.getpixel((0, 0)) == flat.getpixel((100, 100)) == color
    with Image.open(io.BytesIO(Finish(name, size=200).encode(image))) as clear:
        assert clear.mode == "RGBA" and clear.getpixel((0, 0))[3] == 0 and clear.getpixel((25, 100))[3] == 255


def test_hidden_colours_do_not_bleed_into_enlarged_edges():
    small = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    small.paste((255, 0, 0, 255), (2, 2, 6, 6))
    large = np.asarray(on_background(resized(small, 64), "#000000"))
    assert large[..., 1].max() <= 2  # no green, which only hidden pixels have
    assert resized(Image.new("RGBA", (64, 32)), 128).size == (128, 64)


def test_a_trace_looks_like_the_picture():
    image = ring()
    svg = Finish("svg").encode(image, PARAMETERS)
    again = rendered(svg)
    assert again.size == image.size
    for ground in ("#ffffff", "#000000"):
        gap = np.asarray(on_background(again, ground), int) - np.asarray(on_background(image, ground), int)
        assert abs(gap).mean() < 4  # of 255: edges that are half a pixel off
    solid, was = (np.asarray(picture)[..., 3] > 127 for picture in (again, image))
    assert (solid & was).sum() / (solid | was).sum() > 0.98
    assert np.asarray(again)[0, 0, 3] == np.asarray(again)[48, 48, 3] == 0
    assert svg.count(b"<path") < 20 and len(svg) < 25_000


def test_a_trace_is_sound_xml_that_says_how_it_was_made():
    root = ET.fromstring(Finish("svg", size=500).encode(ring(), PARAMETERS))
    space = "{http://www.w3.org/2000/svg}"
    assert (root.get("width"), root.get("height")) == ("500", "500")
    assert root.find(f"{space}title").text == 'a <red> & "blue" ring'
    assert json.loads(root.find(f"{space}desc").text) == PARAMETERS
    assert {child.tag for child in root} == {
        f"{space}{name}" for name in ("title", "desc", "metadata", "path")
    }
    assert {child.tag for child in ET.fromstring(Finish("svg").encode(ring()))} == {f"{space}path"}


def test_the_ground_of_a_trace():
    flat = rendered(Finish("svg", "mint").encode(ring()))
    assert flat.getpixel((0, 0)) == flat.getpixel((48, 48)) == (0xB2, 0xDF, 0xC4, 255)
    for hole in (3, 1):  # a picture that is all but opaque keeps its hole
        full = Image.new("RGBA", (96, 96), (229, 57, 53, 255))
        full.paste((0, 0, 0, 0), (48 - 4 * hole, 48 - 4 * hole, 48 + 4 * hole, 48 + 4 * hole))
        again = rendered(Finish("svg").encode(full))
        assert again.getpixel((48, 48))[3] == 0 and again.getpixel((2, 2)) == (229, 57, 53, 255)
    nothing = Finish("svg").encode(Image.new("RGBA", (32, 32)))
    assert not re.search(b"<path", nothing) and not np.asarray(rendered(nothing))[..., 3].any()
    wide = rendered(Finish("svg").encode(ring().resize((96, 48))))
    assert wide.size == (96, 48)


def test_mistakes_say_what_to_do():
    for options, words in (
        ({"format": "gif"}, "use png, webp, svg"),
        ({"size": 5000}, "size must be from 16 to 4096"),
        ({"background": "reddish"}, "unknown colour 'reddish': use #rrggbb or one of red"),
        ({"background": "#12345"}, "unknown colour"),
    ):
        with pytest.raises(ValueError, match=words):
            Finish(**options)
    assert parse_color("Teal") == "#00897b" and parse_color("#ABC") == "#aabbcc"
    assert pick_format("cat.webp", None) == "webp" and pick_format("cats/", "svg") == "svg"
    assert pick_format(None, None) == pick_format("a.jpg", None) == "png"
    with pytest.raises(ValueError, match="not named as a svg"):
        pick_format("cat.png", "svg")
