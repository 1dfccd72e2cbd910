"""Pictures from outside: checked by their header, decoded, turned upright, RGBA, fitted. Imports no torch."""

from __future__ import annotations

import io
import os
import struct
from typing import IO

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 2**20
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Source = str | os.PathLike[str] | IO[bytes] | bytes | Image.Image


def read_picture(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """RGBA picture of a file (PNG, JPEG, WebP, GIF's first frame, BMP, TIFF), turned upright by its EXIF.

    Raises one of DECODE_ERRORS when it cannot be decoded or, before any pixel is, has more than 64 Mpixel."""
    with Image.open(path, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} is more than {MAX_PIXELS // 2**20} Mpixel")
        return to_rgba(ImageOps.exif_transpose(picture))


def open_picture(source: Source, what: str = "the picture") -> Image.Image:
    """A picture someone hands over, as RGBA: a file's name, an open file, its bytes, or a picture in memory.

    Raises ValueError, one line that begins with `what`, for anything that cannot be drawn from.
    """
    if isinstance(source, Image.Image):
        return to_rgba(source)
    try:
        return read_picture(io.BytesIO(source) if isinstance(source, bytes) else source)
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{what} cannot be read: {error}") from error
        why = str(error) if type(error) is ValueError else "it is damaged, or of another format"
        raise ValueError(f"{what} cannot be read ({why}): use a {', '.join(FORMATS)} file") from error


def to_rgba(picture: Image.Image) -> Image.Image:
    """Any mode to RGBA, decoded; 16-bit grey is scaled, not clipped."""
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode == "RGBA":
        picture.load()  # `convert` would copy what is right already
        return picture
    return picture.convert("RGBA")


def contain(picture: Image.Image, width: int, height: int) -> Image.Image:
    """An RGBA picture scaled to fit a transparent canvas, centred, its shape kept.

    Lanczos over premultiplied colour (Pillow's `resize` premultiplies RGBA), so no dark fringes appear."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if size == (width, height):
        return picture
    canvas = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    canvas.paste(picture, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
