"""Aspect-ratio buckets: batches of one shape each, filled to a number of tokens, a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from diffusionfm.data.order import Batches, Order, draw, draw_all

Shape = tuple[int, int]  # rows, columns
MOST_ASPECT = 4.0  # no bucket is longer than so many times its width; longer pictures are cropped to that
MOST_ENLARGED = (
    1.25  # a picture may grow to so many times its area to fill a bucket; else a smaller side takes it
)


@dataclass
class BucketConfig:
    """Pictures of many shapes in batches of one shape each.

    tokens: how many tokens the pictures of a step have in all; a step of a larger shape holds fewer of them.
    sides: base sides in pixels; a side's buckets have about its square's area. A picture goes to the largest side
        that enlarges it by a quarter of its area at most, or to the smallest, and there to the nearest aspect ratio.
    multiple: every side of a bucket is a multiple of it, in pixels.
    patch: pixels (of stored latents: cells) along each side that one token of the denoiser covers.
    """

    tokens: int = 16384
    sides: list[int] = field(default_factory=lambda: [256])
    multiple: int = 64
    patch: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "multiple", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.buckets.{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.sides or min(self.sides) < self.multiple:
            raise ValueError(
                f"data.buckets.sides is {self.sides}; give one side or more, each at least "
                f"data.buckets.multiple={self.multiple} pixels"
            )


def bucket_shapes(side: int, multiple: int) -> list[Shape]:
    """The shapes (rows, columns) of about side * side pixels, multiples of `multiple`, none longer than 4 to 1."""
    shapes = set()
    for rows in range(multiple, side + multiple, multiple):
        columns = max(1, round(side * side / rows / multiple)) * multiple
        if max(rows, columns) <= MOST_ASPECT * min(rows, columns):
            shapes |= {(rows, columns), (columns, rows)}
    return sorted(shapes)


def nearest_shapes(sizes: np.ndarray, cfg: BucketConfig) -> np.ndarray:
    """The bucket nearest to every picture: sizes (n, 2) width and height -> shapes (n, 2) rows and columns, int64."""
    area = sizes[:, 0].astype(np.float64) * sizes[:, 1]
    aspect = np.log(sizes[:, 0] / sizes[:, 1])
    chosen = np.zeros((len(sizes), 2), dtype=np.int64)
    for rank, side in enumerate(sorted(cfg.sides)):
        shapes = np.array(bucket_shapes(side, cfg.multiple))
        here = np.flatnonzero((side * side <= MOST_ENLARGED * area) | (rank == 0))
        ratios = np.log(shapes[:, 1] / shapes[:, 0])
        order = np.argsort(ratios)
        borders = (ratios[order][1:] + ratios[order][:-1]) / 2
        chosen[here] = shapes[order][np.searchsorted(borders, aspect[here])]
    return chosen


def choose_shapes(
    sizes: np.ndarray, cfg: BucketConfig, batch_size: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """The bucket that every picture is trained in, as `nearest_shapes` but for rare ones.

    A bucket whose pictures (each counted by its weight) do not fill one batch gives them to the nearest that is
    left, so that none is drawn twice in a batch; the last one left keeps all."""
    return _merge_rare(nearest_shapes(sizes, cfg), cfg, batch_size, weights)


def _merge_rare(
    chosen: np.ndarray, cfg: BucketConfig, batch_size: int, weights: np.ndarray | None
) -> np.ndarray:
    shapes, bucket = np.unique(chosen, axis=0, return_inverse=True)
    held = np.bincount(bucket.ravel(), weights=weights, minlength=len(shapes)).astype(np.float64)
    need = np.array([pictures_of(tuple(shape), cfg, batch_size) for shape in shapes.tolist()])
    goes_to, left = np.arange(len(shapes)), list(range(len(shapes)))
    place = np.log(shapes) @ np.array([[1.0, 1.0], [1.0, -1.0]])  # log area, log aspect ratio
    while len(left) > 1 and (rare := [k for k in left if held[k] < need[k]]):
        k = min(rare, key=lambda k: held[k])
        left.remove(k)
        nearest = min(left, key=lambda other: float(np.abs(place[other] - place[k]).sum()))
        goes_to[goes_to == k] = nearest
        held[nearest] += held[k]
    return shapes[goes_to[bucket.ravel()]]


def pictures_of(shape: Shape, cfg: BucketConfig, batch_size: int) -> int:
    """How many pictures of a shape a step has: a multiple of batch_size. ValueError when tokens allow none."""
    each = math.ceil(shape[0] / cfg.patch) * math.ceil(shape[1] / cfg.patch)
    if cfg.tokens < each * batch_size:
        raise ValueError(
            f"data.buckets.tokens={cfg.tokens} does not hold {batch_size} pictures of {shape[1]}x{shape[0]}, "
            f"{each} tokens each: take {each * batch_size} tokens or more, or a smaller trainer.batch_size, of which "
            "the pictures of a step are a multiple"
        )
    return cfg.tokens // each // batch_size * batch_size


def crop_box(size: tuple[int, int], shape: Shape) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of a picture's (width, height) with a shape's aspect ratio."""
    width, height = size
    scale = min(width / shape[1], height / shape[0])
    left, top = (width - shape[1] * scale) / 2, (height - shape[0] * scale) / 2
    return left, top, width - left, height - top


def fit(picture: Image.Image, shape: Shape) -> Image.Image:
    """A picture scaled to fill a shape (rows, columns), cropped as little as that needs, about its centre."""
    size = shape[1], shape[0]
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS, box=crop_box(picture.size, shape))


class BucketBatches(Batches):
    """Batches in which all samples have one shape, sized by tokens, same protocol as Batches.

    shapes: (n, 2) rows and columns of every sample. A dict sample gets its bucket's as `shape`, and `draw`.
    batch_size: the samples of a step, over all ranks, are a multiple of it; rank r gets the r-th contiguous part.
    weights: see Order.

    Each bucket is an endless stream of its own epochs (Order), read batch after batch: no sample is lost, and none
    comes twice before all others of its bucket have come. An epoch of training gives a bucket as many steps as its
    samples fill; what is left over of the last comes first in the next epoch, so an epoch is exact but for less than
    one batch a bucket. Only a bucket with fewer samples than batch_size has one twice in a batch. The steps
    of an epoch are shuffled. Which bucket a step has, and how often that came before, is worked out, not replayed.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], Any],
        shapes: np.ndarray,
        cfg: BucketConfig,
        batch_size: int,
        seed: int,
        weights: np.ndarray | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(dataset, collate, batch_size, seed, weights=weights, workers=workers)
        kept = np.ones(len(shapes), dtype=bool) if weights is None else np.asarray(weights) > 0
        found, bucket = np.unique(np.asarray(shapes), axis=0, return_inverse=True)
        bucket = np.where(kept, bucket.ravel(), -1)
        self.buckets: list[Bucket] = []
        for k, (rows, columns) in enumerate(found.tolist()):
            if len(members := np.flatnonzero(bucket == k)):
                most = pictures_of((rows, columns), cfg, batch_size)
                own = None if weights is None else np.asarray(weights, dtype=np.float64)[members]
                self.buckets.append(Bucket((rows, columns), members, own, most, batch_size, seed))
        self._known: tuple[int, np.ndarray, np.ndarray] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """As that of Batches, and over the buckets and their sizes."""
        digest = hashlib.sha256(super().fingerprint.encode())
        for bucket in self.buckets:
            digest.update(f"{bucket.shape} {bucket.size}".encode() + bucket.members.tobytes())
        return digest.hexdigest()

    def shape(self, step: int) -> Shape:
        """Rows and columns of the samples of a step, on every rank."""
        return self._turn(step)[0].shape

    def size(self, step: int) -> int:
        """How many samples a step has over all ranks."""
        return self._turn(step)[0].size

    def indices(self, step: int) -> list[int]:
        """The samples of this rank's part of a step."""
        bucket, start, size = self._part(step)
        return bucket.members[bucket.order.take(start, size)].tolist()

    def epoch(self, step: int) -> int:
        """The epoch in which a step lies."""
        last = 1
        while self._before(last) <= step:
            last *= 2
        return bisect_right(range(last), step, key=self._before) - 1

    def _extras(self, step: int) -> list[dict[str, Any]]:
        bucket, start, size = self._part(step)
        bits = draw(bucket.order.seed, 0, np.arange(start, start + size), purpose=2)
        return [{"draw": own, "shape": bucket.shape} for own in bits.tolist()]

    def _part(self, step: int) -> tuple[Bucket, int, int]:
        """The bucket of a step, and where in its stream this rank's part begins and how long it is."""
        bucket, before = self._turn(step)
        size = bucket.size // self.world
        return bucket, before * bucket.size + self.rank * size, size

    def _turn(self, step: int) -> tuple[Bucket, int]:
        """The bucket of a step, and how many steps it had before."""
        epoch = self.epoch(step)
        known = self._known
        if known is None or known[0] != epoch:
            steps = [bucket.before(epoch + 1) - bucket.before(epoch) for bucket in self.buckets]
            turns = np.repeat(np.arange(len(steps)), steps)
            turns = turns[np.argsort(draw_all(self.seed, epoch, len(turns), purpose=3))]
            times = np.empty_like(turns)
            for k, count in enumerate(steps):
                times[turns == k] = np.arange(count)
            self._known = known = (epoch, turns, times)
        at = step - self._before(epoch)
        bucket = self.buckets[known[1][at]]
        return bucket, bucket.before(epoch) + int(known[2][at])

    def _before(self, epoch: int) -> int:
        """How many steps come before an epoch."""
        return sum(bucket.before(epoch) for bucket in self.buckets)


class Bucket:
    """The samples of one shape: `members` (n,) of the dataset, `size` of them a step, in an `order` of their own."""

    def __init__(
        self,
        shape: Shape,
        members: np.ndarray,
        weights: np.ndarray | None,
        most: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.shape, self.members = shape, members
        self.an_epoch = len(members) if weights is None else float(weights.sum())
        if weights is not None and self.an_epoch < 1:
            weights = weights * (2 / self.an_epoch)  # only Order needs a sample an epoch; the turns stay rare
        self.size = min(most, max(batch_size, int(self.an_epoch) // batch_size * batch_size))
        own_seed = int(draw(seed, shape[0], np.array([shape[1]]), purpose=4)[0])
        self.order = Order(len(members), own_seed, weights)

    def before(self, epoch: int) -> int:
        """How many of this bucket's steps come before an epoch."""
        return math.floor(epoch * self.an_epoch / self.size)


def commonest(shapes: np.ndarray) -> np.ndarray:
    """The indices at which the commonest of (n, 2) shapes lies."""
    _, bucket, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    return np.flatnonzero(bucket.ravel() == counts.argmax())
