"""What the scorecard sees of a picture: features of a frozen network, and a coarse copy of its pixels.

Axes: n pictures, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from diffusionfm.evaluate.efficientnet import WIDTH, load_network
from diffusionfm.images import on_background

T = TypeVar("T")
SIDE = 160  # pixels: half the work of the 224 the network was trained on, and still more than a picture has
GROUND = "#c8c8c8"  # grey behind transparent pictures: white, black and coloured ink all stand off from it
COARSE = 16  # pixels a side of the coarse copy


@dataclass
class Described:
    """features (n, 1280) float32; coarse (n, 16 * 16 * 4) float32, premultiplied RGBA in [0, 1]."""

    features: np.ndarray
    coarse: np.ndarray

    def __len__(self) -> int:
        return len(self.features)


class Eye:
    """Pictures -> Described. Loads the network once."""

    def __init__(self) -> None:
        self.network = load_network()

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[Image.Image], batch_size: int = 8) -> Described:
        features, coarse = [np.zeros((0, WIDTH), np.float32)], [np.zeros((0, COARSE**2 * 4), np.float32)]
        for group in groups(pictures, batch_size):
            features.append(self.network(torch.stack([seen(picture) for picture in group])).numpy())
            coarse.append(np.stack([coarse_copy(picture) for picture in group]))
        return Described(np.concatenate(features), np.concatenate(coarse))


def groups(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Things by the `size`, as they come."""
    things = iter(things)
    while group := list(islice(things, size)):
        yield group


def pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB picture as (3, y, x) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def seen(picture: Image.Image) -> torch.Tensor:
    """A picture on grey, RGB (3, 160, 160) float32 in [0, 1]."""
    return pixels(on_background(picture, GROUND).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def coarse_copy(picture: Image.Image) -> np.ndarray:
    """Premultiplied RGBA averaged over a 16 x 16 grid, flat float32 in [0, 1]."""
    small = picture.convert("RGBa").resize((COARSE, COARSE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1) / 255
