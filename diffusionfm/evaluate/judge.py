"""Recognition and likeness: pictures and phrases in one space, fitted to training phrases and frozen.

Axes: n pictures, p phrases, d the shared space's width, l likeness coordinates, x pixel coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from diffusionfm.evaluate.describe import Described, Eye


@dataclass
class Views:
    """What is compared: meaning (n, d) of unit length; likeness (n, l) and pixels (n, x), main axes of what is seen."""

    meaning: np.ndarray
    likeness: np.ndarray
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.meaning)

    def take(self, which: Sequence[int] | np.ndarray) -> Views:
        """The pictures of these numbers."""
        which = np.asarray(which, np.int64)
        return Views(self.meaning[which], self.likeness[which], self.pixels[which])


def joined(one: Views, other: Views) -> Views:
    """The pictures of one, then those of the other."""
    return Views(
        *(np.concatenate(pair) for pair in zip(vars(one).values(), vars(other).values(), strict=True))
    )


@dataclass
class Judge:
    """The fitted maps; arrays are those of the assets."""

    arrays: dict[str, np.ndarray]
    phrases: list[str]

    def views(self, seen: Described) -> Views:
        """What the instrument compares of described pictures."""
        a = {name: self.arrays[name].astype(np.float32) for name in self.arrays if name.startswith("map.")}
        features, coarse = seen.features - a["map.mean"], seen.coarse - a["map.pixel_mean"]
        return Views(
            unit(features @ a["map.meaning"]), features @ a["map.likeness"], coarse @ a["map.pixels"]
        )

    def see(self, pictures: Sequence[Image.Image]) -> Views:
        """`views` of pictures."""
        return self.views(self.eye(pictures))

    def ranks(self, views: Views, truths: Sequence[str]) -> np.ndarray:
        """How many of the phrases are nearer to each picture than the true one, (n,): 0 is recognised."""
        near = views.meaning @ self.places.T
        true = near[np.arange(len(views)), [self.phrases.index(truth) for truth in truths]]
        return (near > true[:, None]).sum(1)

    def nearest(self, views: Views) -> list[str]:
        """The phrase nearest to each picture."""
        return [self.phrases[k] for k in (views.meaning @ self.places.T).argmax(1)]

    def only(self, phrases: Sequence[str]) -> Judge:
        """One that knows no others than these of the phrases."""
        rows = [self.phrases.index(phrase) for phrase in phrases]
        return Judge(self.arrays | {"phrases": self.arrays["phrases"][rows]}, list(phrases))

    @cached_property
    def places(self) -> np.ndarray:
        """Where the phrases are, (p, d)."""
        return self.arrays["phrases"].astype(np.float32)

    @cached_property
    def eye(self) -> Eye:
        return Eye()


def unit(x: np.ndarray) -> np.ndarray:
    """Rows at length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-8)
