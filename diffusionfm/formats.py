"""From a drawn picture to the bytes of its file: PNG, WebP or a traced SVG, enlarged, on a ground of one's choice."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from PIL import Image, ImageColor, ImageFilter

from diffusionfm.colors import COLORS, rgb
from diffusionfm.images import encode_png, encode_webp, on_background, provenance

FORMATS = ("png", "webp", "svg")
SIZE = (16, 4096)
TRACED = 512  # the side, in pixels, that a smaller picture is enlarged to before it is traced
FLAT, NEAR = 24, 20  # colours of a traced picture, and how far, in 8-bit RGB, they are apart
_MARGIN = 2  # transparent pixels around a picture to trace


@dataclass(frozen=True)
class Finish:
    """What becomes of a drawn picture before it is a file.

    format: "png", "webp" (lossless) or "svg" (see `trace`). background: a colour word or "#rrggbb" that the picture is
    laid on; None keeps it transparent. size: pixels of the longer side, 16 to 4096; None keeps it as drawn. An
    SVG scales anyway: its size is what it says of itself. ValueError for anything else.
    """

    format: str = "png"
    background: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: use {', '.join(FORMATS)}")
        if self.background is not None:
            object.__setattr__(self, "background", parse_color(self.background))
        if self.size is not None and not SIZE[0] <= self.size <= SIZE[1]:
            raise ValueError(f"size must be from {SIZE[0]} to {SIZE[1]} pixels, got {self.size}")

    @property
    def suffix(self) -> str:
        """Of the file's name, with its dot."""
        return f".{self.format}"

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def picture(self, image: Image.Image) -> Image.Image:
        """The picture at its size and on its ground, RGBA or RGB."""
        if self.size is not None:
            image = resized(image, self.size)
        return image if self.background is None else on_background(image, self.background)

    def pixels(self, image: Image.Image) -> tuple[int, int]:
        """Width and height of the finished picture."""
        return _scaled(image.size, self.size)

    def advice(self, drawn: tuple[int, int]) -> list[str]:
        """What to know where a picture of the size `drawn` is resampled to another: it shows no more than it did."""
        size = drawn if self.format == "svg" else _scaled(drawn, self.size)
        if size == drawn:
            return []
        told, wanted = (f"{width}x{height}" for width, height in (drawn, size))
        return [f"drawn at {told} and {'enlarged' if size > drawn else 'shrunk'} to {wanted}"]

    def encode(self, image: Image.Image, parameters: dict[str, Any] | None = None) -> bytes:
        """The file's bytes, the same for the same picture and parameters; with None it says nothing of them."""
        if self.format == "svg":
            return trace(image, self.background, self.size, parameters)
        encode = encode_png if self.format == "png" else encode_webp
        return encode(self.picture(image), parameters)


def pick_format(output: str | None, chosen: str | None) -> str:
    """The format that --format or else the output's suffix asks for, else PNG; ValueError when they disagree."""
    suffix = PurePath(output or "").suffix.lower().lstrip(".")
    if chosen is not None and suffix in FORMATS and suffix != chosen:
        raise ValueError(f"{output!r} is not named as a {chosen}: leave out --format, or name it .{chosen}")
    return chosen or (suffix if suffix in FORMATS else FORMATS[0])


def parse_color(text: str) -> str:
    """ "#rrggbb" of a colour word the model knows, or of "#rgb" or "#rrggbb"; ValueError for anything else."""
    if re.fullmatch(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})", text):
        red, green, blue = ImageColor.getrgb(text)[:3]
    else:
        try:
            red, green, blue = rgb(text.strip().lower())
        except ValueError as error:
            raise ValueError(f"unknown colour {text!r}: use #rrggbb or one of {', '.join(COLORS)}") from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def resized(image: Image.Image, side: int) -> Image.Image:
    """A picture scaled so that its longer side is `side` pixels.

    By Lanczos on colours multiplied by alpha (Pillow does so for RGBA): hidden colours do not bleed into edges.
    """
    size = _scaled(image.size, side)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


# ------------------------------------------------------------------ SVG


def trace(
    image: Image.Image,
    background: str | None = None,
    size: int | None = None,
    parameters: dict[str, Any] | None = None,
) -> bytes:
    """An SVG of filled splines, by vtracer, that looks like the RGBA `image`: flat colours, transparent ground.

    What is half transparent or less is left out, the rest is opaque: soft shadows become edges. A background,
    "#rrggbb", is a rectangle under the picture. size: of the longer side. Parameters go in <title> and <desc>, IPTC's
    digitalSourceType in <metadata>.
    """
    import vtracer

    large = _flat(image.convert("RGBA"), max(TRACED, *image.size))
    ground = Image.new("RGBA", (large.width + 2 * _MARGIN, large.height + 2 * _MARGIN))
    ground.paste(large, (_MARGIN, _MARGIN))
    buffer = io.BytesIO()
    ground.save(buffer, "PNG", compress_level=1)
    # The margin makes vtracer see that the ground is transparent: it looks at a few lines of pixels, the first one too.
    found = vtracer.convert_raw_image_to_svg(
        buffer.getvalue(),
        img_format="png",
        colormode="color",
        hierarchical="stacked",
        mode="spline",
        filter_speckle=8,
        color_precision=8,
        layer_difference=0,
        path_precision=2,
    )
    body = "\n".join(re.findall(r"<path [^>]*/>", found))
    wide, high = _scaled(image.size, size)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" '
        f'viewBox="{_MARGIN} {_MARGIN} {large.width} {large.height}">'
    )
    notes = "" if parameters is None else _notes(parameters)
    plate = ""
    if background is not None:
        plate = f'<rect x="{_MARGIN}" y="{_MARGIN}" width="100%" height="100%" fill="{background}"/>\n'
    return f"{head}\n{notes}{plate}{body}\n</svg>\n".encode()


def _flat(image: Image.Image, side: int) -> Image.Image:
    """The RGBA picture with a longer side of `side` pixels, in few flat colours, each pixel opaque or clear.

    Left to itself vtracer joins the colours of a soft shade to one, and loses what lies in it."""
    large = resized(image, side)
    clear = large.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
    dots = large.convert("RGB").quantize(palette=_palette(image), dither=Image.Dither.NONE)
    smooth = Image.frombytes("L", dots.size, dots.tobytes()).filter(ImageFilter.ModeFilter(5))
    dots.frombytes(smooth.tobytes())
    flat = dots.convert("RGBA")
    flat.putalpha(clear)
    return flat


def _palette(image: Image.Image) -> Image.Image:
    """A picture with the palette of the RGBA image: FLAT colours at most, no two within NEAR of each other."""
    import numpy as np

    dots = np.asarray(image).reshape(-1, 4)
    solid = dots[dots[:, 3] > 127, :3]
    row = Image.fromarray(solid[None] if len(solid) else np.zeros((1, 1, 3), np.uint8))
    few = row.quantize(FLAT, Image.Quantize.MEDIANCUT, kmeans=3).convert("RGB").getcolors(FLAT)
    kept: list[tuple[int, ...]] = []
    for _, color in sorted(few or [], reverse=True):
        assert isinstance(color, tuple)
        if all(math.dist(color, other) > NEAR for other in kept):
            kept.append(color)
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for color in kept for value in color])
    return palette


def _scaled(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    scale = 1.0 if side is None else side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _notes(parameters: dict[str, Any]) -> str:
    """The prompt as the title that a reader speaks, everything as JSON, and where the picture is from."""
    title = re.sub(
        r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(parameters.get("prompt", ""))
    )
    text = json.dumps(parameters, ensure_ascii=True, sort_keys=True)
    origin = f"<metadata>{provenance(parameters)}</metadata>\n"
    said = f"<title>{escape(title, quote=False)}</title>\n<desc>{escape(text, quote=False)}</desc>\n"
    return said + origin
