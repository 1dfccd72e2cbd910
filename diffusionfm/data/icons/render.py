"""Drawings into square RGBA pictures: SVG rendering, cropping to the drawn box, ink and background."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from diffusionfm.colors import rgb
from diffusionfm.data.icons.sources import Drawing

PADDING = 0.04
OVERSAMPLE = 2
TEXT = re.compile(r"<(\w+:)?text\b(?:[^>]*/>|.*?</(?:\w+:)?text\s*>)", re.DOTALL)


def render(drawing: Drawing, size: int) -> Image.Image | None:
    """The drawing as a `size` x `size` straight-alpha RGBA picture, or None when nothing can be drawn.

    The picture is cropped to the drawn box, centred and padded by 4 % so that every source fills its square alike.
    """
    picture: Image.Image | None
    if drawing.is_raster:
        with Image.open(drawing.file) as image:
            picture = image.convert("RGBA")
    else:
        picture = _svg(
            drawing.svg or Path(drawing.file).read_text(encoding="utf-8", errors="replace"), size * OVERSAMPLE
        )
    return None if picture is None else fit(picture, size)


def _svg(svg: str, size: int) -> Image.Image | None:
    """Rendered markup with its long side at `size` pixels: resvg, or cairosvg where resvg refuses."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    except ValueError:
        png = _cairo(svg, size)
    if not png:
        return None
    image = Image.open(io.BytesIO(bytes(png)))
    if max(image.size) > 8 * size or min(image.size) < 2:
        return None
    return image.convert("RGBA")


def _cairo(svg: str, size: int) -> bytes:
    """Rendered markup without its text: that would depend on the machine's fonts, and on what was drawn before it."""
    from xml.etree.ElementTree import ParseError

    import cairosvg

    try:
        return cairosvg.svg2png(bytestring=TEXT.sub("", svg).encode(), output_width=size, unsafe=False)
    except (
        ValueError,
        ParseError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
        OSError,
        MemoryError,
    ):
        return b""  # a malformed drawing: left out and counted by the caller


def fit(picture: Image.Image, size: int) -> Image.Image | None:
    """Crop an RGBA picture to what is drawn, pad it to a square and resize it with premultiplied alpha."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 4:
        return None
    cropped = picture.crop(box)
    side = max(cropped.size)
    inner = round(size * (1 - 2 * PADDING))
    width, height = (max(1, round(s * inner / side)) for s in cropped.size)
    if width < size // 12 or height < size // 12:
        return None
    small = cropped.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return clear_hidden(square)


def clear_hidden(picture: Image.Image) -> Image.Image:
    """The picture with colour zeroed wherever alpha is zero, so that equal-looking pictures have equal bytes."""
    pixels = np.array(picture)
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels, "RGBA")


def inked(picture: Image.Image, word: str) -> Image.Image:
    """A monochrome picture redrawn in one colour of the table, its alpha kept."""
    pixels = np.array(picture)
    pixels[..., :3] = rgb(word)
    return clear_hidden(Image.fromarray(pixels, "RGBA"))


def on_color(picture: Image.Image, word: str) -> Image.Image:
    """The picture on an opaque square of one colour of the table."""
    square = Image.new("RGBA", picture.size, (*rgb(word), 255))
    square.alpha_composite(picture)
    return square


def edge_color(picture: Image.Image) -> tuple[float, float, float]:
    """Mean colour of what is drawn, weighted by alpha: a background should differ from it."""
    pixels = np.asarray(picture, dtype=np.float32)
    weight = pixels[..., 3:] / 255
    mean = (pixels[..., :3] * weight).sum((0, 1)) / max(float(weight.sum()), 1.0)
    return float(mean[0]), float(mean[1]), float(mean[2])


def fingerprint(picture: Image.Image) -> bytes:
    """A small coarse render: equal for pictures that look the same."""
    small = picture.convert("RGBa").resize((32, 32), Image.Resampling.BOX)
    return (np.asarray(small) // 16).tobytes()
