"""What the scorecard sees of a picture: features of a frozen network, and a coarse copy of its pixels.

Axes: n pictures, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffusionfm.evaluate.network import WIDTH, load_network

SIDE = 160  # pixels: half the work of the 224 the network was trained on, and still more than a picture has
GROUND = 200  # grey behind transparent pictures: white, black and coloured ink all stand off from it
COARSE = 16  # pixels a side of the coarse copy


@dataclass
class Described:
    """features (n, 1280) float32; coarse (n, 16 * 16 * 4) float32, premultiplied RGBA in [0, 1]."""

    features: np.ndarray
    coarse: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def take(self, which: Sequence[int] | np.ndarray) -> Described:
        """The pictures of these numbers."""
        return Described(self.features[which], self.coarse[which])


class Eye:
    """Pictures -> Described. Loads the network once."""

    def __init__(self) -> None:
        self.network = load_network()

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[Image.Image], batch_size: int = 8) -> Described:
        features, coarse, waiting = [np.zeros((0, WIDTH), np.float32)], [np.zeros((0, COARSE**2 * 4))], []
        for picture in pictures:
            waiting.append(seen(picture))
            coarse.append(coarse_copy(picture)[None])
            if len(waiting) == batch_size:
                features.append(self.network(torch.stack(waiting)).numpy())
                waiting.clear()
        if waiting:
            features.append(self.network(torch.stack(waiting)).numpy())
        return Described(np.concatenate(features), np.concatenate(coarse).astype(np.float32))


def seen(picture: Image.Image) -> torch.Tensor:
    """A picture on grey, RGB (3, 160, 160) float32 in [0, 1]."""
    ground = Image.new("RGBA", picture.size, (GROUND, GROUND, GROUND, 255))
    flat = Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    flat = flat.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).float() / 255


def coarse_copy(picture: Image.Image) -> np.ndarray:
    """Premultiplied RGBA averaged over a 16 x 16 grid, flat float32 in [0, 1]."""
    small = picture.convert("RGBa").resize((COARSE, COARSE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1) / 255
