"""The training order: which samples a step sees, a pure function of (seed, step) at any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

MASK = 2**64 - 1


def draw(seed: int, epoch: int, positions: np.ndarray, purpose: int = 0) -> np.ndarray:
    """64 random bits a position, uint64 (n,): splitmix64 of (seed, purpose, epoch, position)."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in (seed, purpose, epoch):
            key = _mix(key ^ np.uint64(word & MASK))
        return _mix(_mix(positions.astype(np.uint64)) ^ key)


def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """Epochs of n samples, each a permutation of its own, keyed by (seed, epoch).

    weights: (n,) floats >= 0, or None for one each. Sample i comes floor(w) times an epoch, and once more
        with the chance of w's fraction, drawn from (seed, epoch, i). ValueError for weights that are not n
        numbers of 0 or more, or too small to draw from.
    """

    def __init__(self, n: int, seed: int, weights: Sequence[float] | np.ndarray | None = None) -> None:
        if n < 1:
            raise ValueError("there are no samples to order")
        self.n = n
        self.seed = seed
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights is not None:
            if self.weights.shape != (n,) or not np.isfinite(self.weights).all() or self.weights.min() < 0:
                raise ValueError(f"weights must be {n} finite numbers of 0 or more, one a sample")
            if self.weights.sum() < 1:
                raise ValueError("weights add up to less than one sample an epoch; scale them up")
        self._ends: list[int] = []  # global position at which each epoch ends; only for weights
        self._cache: tuple[tuple[int, np.ndarray], ...] = ()

    def epoch(self, epoch: int) -> np.ndarray:
        """The sample indices of an epoch in their order, int64 (length(epoch),)."""
        for known, order in self._cache:
            if known == epoch:
                return order
        pool = self._pool(epoch)
        order = pool[np.argsort(draw(self.seed, epoch, np.arange(len(pool))), kind="stable")]
        self._cache = (*self._cache[-1:], (epoch, order))  # a batch may lie across two epochs
        return order

    def length(self, epoch: int) -> int:
        """How many samples an epoch has: n, or about the sum of the weights."""
        return self.n if self.weights is None else int(self._counts(epoch, self.weights).sum())

    def index(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        return int(self.epoch(epoch)[position])

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, position in it) of a position counted from the start of training."""
        if self.weights is None:
            return divmod(position, self.n)
        while not self._ends or self._ends[-1] <= position:
            ends = self._ends
            self._ends = [*ends, (ends[-1] if ends else 0) + self.length(len(ends))]
        epoch = int(np.searchsorted(self._ends, position, side="right"))
        return epoch, position - (self._ends[epoch - 1] if epoch else 0)

    def take(self, start: int, count: int) -> list[int]:
        """The samples at positions start to start + count since training began, across epoch borders."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, position = self.locate(start + len(taken))
            taken += self.epoch(epoch)[position : position + count - len(taken)].tolist()
        return taken

    def _counts(self, epoch: int, weights: np.ndarray) -> np.ndarray:
        chance = (draw(self.seed, epoch, np.arange(self.n), purpose=1) >> np.uint64(11)) * 2.0**-53
        return np.floor(weights).astype(np.int64) + (chance < weights % 1)

    def _pool(self, epoch: int) -> np.ndarray:
        samples = np.arange(self.n)
        return samples if self.weights is None else np.repeat(samples, self._counts(epoch, self.weights))


class Batches:
    """Batches for training: `batch(step)` is a pure function of (seed, step), so resume just asks on.

    dataset: dataset[i] -> sample, for 0 <= i < len(dataset). A dict sample gets `draw`, 64 random bits of its
        own each time it comes by, from (seed, position), for choices such as which caption or flip.
    collate: list of samples -> batch.
    batch_size: samples a step over all ranks, a multiple of `world`; rank r gets the r-th contiguous part.
    weights: see Order.
    workers: threads that prepare the coming batches of `stream`; 0 prepares each when it is asked for.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
        workers: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        self.dataset, self.collate = dataset, collate
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.split(rank, world)
        self.order = Order(len(dataset), seed, weights)

    def split(self, rank: int, world: int) -> None:
        """Give this process the `rank`-th part of every batch; the trainer calls it once it knows its ranks."""
        if self.batch_size % world:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the {world} processes"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} must be from 0 to {world - 1}")
        self.rank, self.world = rank, world

    def indices(self, step: int) -> list[int]:
        """The samples of this rank's part of a step."""
        return self.order.take(*self._span(step))

    def batch(self, step: int) -> Any:
        """The collated batch of a step (this rank's part)."""
        start, count = self._span(step)
        bits = draw(self.seed, 0, np.arange(start, start + count), purpose=2).tolist()
        samples = [self.dataset[i] for i in self.indices(step)]
        pairs = zip(samples, bits, strict=True)
        return self.collate([{**s, "draw": own} if isinstance(s, dict) else s for s, own in pairs])

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return self.order.locate(step * self.batch_size)[0]

    def stream(self, start_step: int = 0) -> Iterator[Any]:
        """Batches start_step, start_step + 1, ... without end, a few prepared ahead by threads."""
        if not self.workers:
            step = start_step
            while True:
                yield self.batch(step)
                step += 1
        ahead = min(4, self.workers + 1)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
        try:
            coming: deque[Future] = deque(pool.submit(self.batch, start_step + k) for k in range(ahead))
            step = start_step + ahead
            while True:
                batch = coming.popleft().result()
                coming.append(pool.submit(self.batch, step))
                step += 1
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _span(self, step: int) -> tuple[int, int]:
        count = self.batch_size // self.world
        return step * self.batch_size + self.rank * count, count
