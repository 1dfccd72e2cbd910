"""A picture that a stranger uploads: judged by its header, then decoded, or refused in one line. Imports no torch."""

from __future__ import annotations

import os
import struct
import threading

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20 * 10**6
MAX_PIXELS = 50 * 10**6  # a photograph of a good telephone; 200 MB once decoded
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error)
_one_at_a_time = threading.Lock()  # so that many uploads at once need the memory of one


class BadUpload(ValueError):
    """A file that is not taken: one line with the fix in it, for the person who sent it."""


def open_upload(path: str | os.PathLike[str]) -> Image.Image:
    """The picture of a file as RGBA, the first of an animation, turned upright by its EXIF and with no metadata.

    Its suffix means nothing. Raises BadUpload, a ValueError: before a pixel is decoded for a file of over MAX_BYTES,
    of another format (SVG, TIFF, PDF ...) or of over MAX_PIXELS, and afterwards for a damaged one.
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise BadUpload(f"the picture has {size:,} bytes: {MAX_BYTES:,} at most, so save it smaller")
    too_many = f"the picture has too many pixels: {MAX_PIXELS:,} at most, so save it smaller"
    try:
        with _one_at_a_time, Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadUpload(too_many)
            return _upright(picture)
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise BadUpload(too_many) from error
    except DAMAGED as error:
        if isinstance(error, BadUpload) or getattr(error, "errno", None):
            raise  # told already, or the disk's fault
        raise BadUpload(f"this picture cannot be read: upload a whole {', '.join(FORMATS)} file") from error


def _upright(picture: Image.Image) -> Image.Image:
    """Decoded, RGBA; 16-bit grey is scaled, not clipped. Nothing but pixels is taken over."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I"):
        turned = turned.convert("I").point(lambda value: value / 257).convert("L")
    turned = turned.convert("RGBA")
    turned.info.clear()
    return turned
