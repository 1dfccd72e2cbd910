"""Drawing from a picture instead of from noise alone: how far to leave it, where, and how it is put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageFilter

from diffusionfm.checks import check_settings
from diffusionfm.inputs import Source, contain, open_picture

if TYPE_CHECKING:  # the commands import this file for their help
    import numpy as np

VARIATIONS = {"subtle": 0.7, "medium": 0.85, "strong": 0.95}
FEATHER = 64  # the longer side over the width of a mask's soft edge


@dataclass(frozen=True, eq=False)
class Start:
    """A picture to set out from. Make one with `start_from`.

    picture: RGBA, of the size to draw. strength: 0.01 (all but the same) to 1 (nothing of it stays), the share of noise
    that it is covered with. mask: "L" of the same size, 255 where to draw anew and 0 where not a bit may change;
    None draws everywhere.
    """

    picture: Image.Image
    strength: float
    mask: Image.Image | None = None

    def merge(self, drawn: Image.Image) -> Image.Image:
        """The drawn RGBA picture where the mask allows, over the first; without a mask just as drawn."""
        return drawn if self.mask is None else composite(self.picture, drawn, self.mask)


def default_strength(masked: bool) -> float:
    """The strength where none is given: what a mask frees is drawn whole, a picture without one keeps its layout."""
    return 1.0 if masked else 0.8


def start_from(
    image: Source,
    width: int,
    height: int,
    strength: float | None = None,
    mask: Source | None = None,
    mask_is_transparent: bool = False,
) -> Start:
    """Set out from a picture of any size, shape and mode, fitted to width x height on a transparent ground.

    mask: as large as the picture, white where to draw anew and black where to keep; or, with `mask_is_transparent`,
    transparent where to draw anew (OpenAI's way). strength: see `Start`; None is `default_strength`.
    Raises ValueError for a picture or mask that cannot be read, sizes that differ, and a mask that selects nothing.
    """
    check_settings(strength=strength, width=width, height=height)
    picture = open_picture(image)
    if strength is None:
        strength = default_strength(mask is not None)
    fitted = contain(picture, width, height)
    if mask is None:
        return Start(fitted, strength)
    chosen = open_picture(mask, "the mask")
    if chosen.size != picture.size:
        raise ValueError(
            f"the mask is {chosen.width} x {chosen.height} pixels and the picture {picture.width} x {picture.height}: "
            "make it as large as the picture"
        )
    free = _transparent(chosen) if mask_is_transparent else _white(chosen)
    fitted_mask = contain(free.convert("RGBA"), width, height)
    binary = _white(fitted_mask).point(lambda level: 255 if level > 127 else 0)
    if binary.getbbox() is None:
        how = "transparent" if mask_is_transparent else "white"
        raise ValueError(f"the mask selects nothing: make {how} what is to be drawn anew")
    return Start(fitted, strength, binary)


def _white(picture: Image.Image) -> Image.Image:
    """How white an RGBA picture is on black, "L"."""
    return ImageChops.multiply(picture.convert("L"), picture.getchannel("A"))


def _transparent(picture: Image.Image) -> Image.Image:
    return ImageChops.invert(picture.getchannel("A"))


def cells(mask: Image.Image, unit: int) -> np.ndarray:
    """The latent pixels, float32 (y, x), of `unit` pixels a side, that a mask sets free: 1 where it touches, else 0."""
    import numpy as np

    free = np.asarray(mask) > 127
    y, x = (side // unit for side in free.shape)
    return np.asarray(free.reshape(y, unit, x, unit).any(axis=(1, 3)), dtype=np.float32)


def composite(kept: Image.Image, drawn: Image.Image, mask: Image.Image) -> Image.Image:
    """Two RGBA pictures as one: `drawn` where the mask is 255, and `kept`, byte for byte, where it is 0.

    Towards its edge the drawn part thins out, inside the mask only. Colours are mixed in proportion to alpha, so that
    no hidden colour shines through.
    """
    import numpy as np

    weight = _soft(mask)[..., None]
    old, new = (np.asarray(picture, dtype=np.float32) for picture in (kept, drawn))
    old_share, new_share = (1 - weight) * old[..., 3:], weight * new[..., 3:]
    alpha = old_share + new_share
    color = (old_share * old[..., :3] + new_share * new[..., :3]) / np.maximum(alpha, 1e-6)
    mixed = np.concatenate([color, alpha], axis=-1).round().astype(np.uint8)
    mixed = np.where(weight == 0, np.asarray(kept), np.where(weight == 1, np.asarray(drawn), mixed))
    return Image.fromarray(mixed, "RGBA")


def _soft(mask: Image.Image) -> np.ndarray:
    """The weight, float32 (y, x), of what is drawn: 0 outside the mask, rising to 1 over its first pixels inside."""
    import numpy as np

    feather = max(1, round(max(mask.size) / FEATHER))
    layers = [mask]
    while len(layers) < feather:
        layers.append(layers[-1].filter(ImageFilter.MinFilter(3)))
    return np.stack([np.asarray(layer) > 127 for layer in layers]).astype(np.float32).mean(axis=0)
