"""Pixels to words and shapes: colour masks in a perceptual space, what is drawn, its pieces and their outlines.

Axes: y x rows and columns. Masks are bool (y, x).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from diffusionfm.colors import COLORS, rgb
from diffusionfm.outlines import OUTLINES

WORDS = tuple(COLORS)
LIGHTNESS = 0.5  # weight beside hue and chroma: a shaded red is a red
OFF_GROUND = 0.1  # OKLab distance at which a pixel is drawn, not ground
RING = 0.025  # width of the border looked at, of the picture's side
PIECE = 0.2, 0.003  # least area of a piece, of the largest piece's and of the picture's
LIKENESS = 0.7  # least overlap (intersection over union) with a shape's outline
OUTLINE = 32  # pixels a side at which outlines are compared


# ------------------------------------------------------------------ colours


def oklab(color: np.ndarray) -> np.ndarray:
    """OKLab coordinates (..., 3) of 8-bit sRGB (..., 3): equal distances look about equal (Ottosson 2020)."""
    value = np.asarray(color, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    axes = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ cones.T) @ axes.T


@cache
def _table() -> np.ndarray:
    return oklab(np.array([rgb(word) for word in WORDS]))


def color_words(color: np.ndarray) -> np.ndarray:
    """The index in WORDS of the colour word nearest to each 8-bit sRGB colour (..., 3)."""
    weight = np.array([LIGHTNESS, 1.0, 1.0])
    away = (oklab(color)[..., None, :] - _table()) * weight
    return np.square(away).sum(-1).argmin(-1)


# ------------------------------------------------------------------ what is drawn


def ring(shape: tuple[int, ...]) -> np.ndarray:
    """The mask of a picture's border."""
    width = max(1, round(RING * min(shape)))
    mask = np.ones(shape, bool)
    mask[width:-width, width:-width] = False
    return mask


def ground_color(pixels: np.ndarray) -> np.ndarray | None:
    """The colour (3,) all around the border of RGBA pixels (y, x, 4); None where the border is transparent."""
    border = pixels[ring(pixels.shape[:2])]
    return np.median(border[:, :3], axis=0) if (border[:, 3] > 127).mean() > 0.5 else None


def drawn(pixels: np.ndarray) -> np.ndarray:
    """The mask of what is drawn: not transparent, and not the colour of an opaque ground."""
    opaque = pixels[..., 3] > 127
    ground = ground_color(pixels)
    if ground is None:
        return opaque
    return opaque & (np.linalg.norm(oklab(pixels[..., :3]) - oklab(ground), axis=-1) > OFF_GROUND)


def colored(pixels: np.ndarray, word: str) -> np.ndarray:
    """The mask of what is drawn in one colour of the table."""
    return drawn(pixels) & (color_words(pixels[..., :3]) == WORDS.index(word))


# ------------------------------------------------------------------ pieces and their shapes


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected pieces, holes filled, the largest first; specks are left out (see PIECE)."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    found = [ndimage.binary_fill_holes(labels == k) for k in range(1, count + 1)]
    found.sort(key=lambda piece: -int(piece.sum()))
    if not found:
        return []
    least = max(PIECE[0] * found[0].sum(), PIECE[1] * mask.size)
    return [piece for piece in found if piece.sum() >= least]


def outline(mask: np.ndarray) -> np.ndarray:
    """A piece stretched from its box to a square of OUTLINE pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(cut.astype(np.uint8) * 255).resize((OUTLINE, OUTLINE), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


@cache
def _outlines() -> dict[str, np.ndarray]:
    found = {}
    for word, corners in OUTLINES.items():
        image = Image.new("L", (256, 256))
        ImageDraw.Draw(image).polygon([(128 + 120 * x, 128 + 120 * y) for x, y in corners], fill=255)
        found[word] = outline(np.asarray(image) > 127)
    return found


def shape_word(piece: np.ndarray) -> str | None:
    """The shape a piece is most like, None where it is like none; a box much longer than wide is none either."""
    height, width = (np.ptp(np.flatnonzero(piece.any(axis))) + 1 for axis in (1, 0))
    if not 0.6 < width / height < 1.67:
        return None
    seen = outline(piece)
    overlap = {word: (seen & known).sum() / (seen | known).sum() for word, known in _outlines().items()}
    best = max(overlap, key=lambda word: overlap[word])
    return best if overlap[best] >= LIKENESS else None
