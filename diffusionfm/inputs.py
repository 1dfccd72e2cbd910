"""Pictures from outside: checked by their header, decoded, turned upright, RGBA, fitted. Imports no torch."""

from __future__ import annotations

import io
import os
import struct
import threading
from typing import IO

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 2**20
HANDED_FORMATS = FORMATS[:4]
"""Of pictures that are handed over, by strangers too: what browsers make, and no decoder more."""
HANDED_BYTES = 20 * 10**6
HANDED_PIXELS = 50 * 10**6  # a photograph of a good telephone; 200 MB once decoded
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)
_one_at_a_time = threading.Lock()  # so that many handed over at once need the memory of one

Source = str | os.PathLike[str] | IO[bytes] | bytes | Image.Image


def read_picture(
    path: str | os.PathLike[str] | IO[bytes], formats: tuple[str, ...] = FORMATS, most: int = MAX_PIXELS
) -> Image.Image:
    """RGBA picture of a file (PNG, JPEG, WebP, GIF's first frame, BMP, TIFF), turned upright by its EXIF.

    Raises one of DECODE_ERRORS when it cannot be decoded or, before any pixel is, has more than `most` pixels."""
    with Image.open(path, formats=formats) as picture:
        if picture.width * picture.height > most:
            raise Image.DecompressionBombError(
                f"{picture.width}x{picture.height} is more than {most:,} pixels"
            )
        return to_rgba(ImageOps.exif_transpose(picture))


def open_picture(source: Source, what: str = "the picture") -> Image.Image:
    """A picture someone hands over, as RGBA: a file's name, an open file, its bytes, or a picture in memory.

    A file's suffix means nothing, and nothing but pixels is taken over. Raises ValueError, one line that begins with
    `what`: before a pixel is decoded for a file of over HANDED_BYTES, of another format (SVG, TIFF, PDF ...) or of
    over HANDED_PIXELS, and afterwards for a damaged one.
    """
    if isinstance(source, Image.Image):
        return to_rgba(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        size = _size(file)
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if size > HANDED_BYTES:
        raise ValueError(f"{what} has {size:,} bytes: {HANDED_BYTES:,} at most, so save it smaller")
    try:
        with _one_at_a_time:
            picture = read_picture(file, HANDED_FORMATS, HANDED_PIXELS).copy()  # without what EXIF it holds
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{what} has too many pixels: {HANDED_PIXELS:,} at most, so save it smaller"
        ) from error
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{what} cannot be read: {error}") from error
        raise ValueError(f"{what} cannot be read: use a whole {', '.join(HANDED_FORMATS)} file") from error
    picture.info.clear()
    return picture


def _size(file: str | os.PathLike[str] | IO[bytes]) -> int:
    """Bytes of a file."""
    if isinstance(file, (str, os.PathLike)):
        return os.path.getsize(file)
    return file.seek(0, os.SEEK_END)


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
