"""The training order: which samples a step sees, a pure function of (seed, step) at any number of ranks."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

MASK = 2**64 - 1
CHUNK = 2**15  # draws made at a time: they stay in the processor's cache
STRETCH = 2**16  # about how many positions of an epoch are sorted at a time


def draw(seed: int, epoch: int, positions: np.ndarray, purpose: int = 0) -> np.ndarray:
    """64 random bits a position, uint64 (n,), all different: splitmix64 of (seed, purpose, epoch, position)."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in (seed, purpose, epoch):
            key = _mix(key ^ np.uint64(word & MASK))
        return _mix(_mix(positions.astype(np.uint64)) ^ key)


def draw_all(seed: int, epoch: int, n: int, purpose: int = 0) -> np.ndarray:
    """The draws of positions 0 to n - 1."""
    bits = np.empty(n, dtype=np.uint64)
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        bits[start:stop] = draw(seed, epoch, np.arange(start, stop), purpose)
    return bits


def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Shuffle:
    """The order that sorting all-different 64-bit numbers gives, sorted no further than what is asked for.

    bits: uint64 (n,), spread evenly. Its highest bits tell the stretch of the order that a number falls in, so
    that a look into the middle costs two passes over the numbers and the sorting of one stretch.
    """

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits
        self.shift = np.uint64(64 - max(1, (len(bits) // STRETCH).bit_length()))
        counts = np.zeros(2 ** (64 - int(self.shift)), dtype=np.int64)
        for start in range(0, len(bits), CHUNK):
            highest = (bits[start : start + CHUNK] >> self.shift).astype(np.int64)
            counts += np.bincount(highest, minlength=len(counts))
        self.ends = np.cumsum(counts)
        self._known: tuple[tuple[int, np.ndarray], ...] = ()

    def part(self, start: int, stop: int) -> np.ndarray:
        """Places start to stop of the order: the index of the number at each, int64."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        before = int(self.ends[first - 1]) if first else 0
        stretches = [self._stretch(k) for k in range(int(first), int(last) + 1)]
        return np.concatenate(stretches)[start - before : stop - before]

    def _stretch(self, k: int) -> np.ndarray:
        for known, stretch in self._known:
            if known == k:
                return stretch
        members = np.flatnonzero((self.bits >> self.shift) == np.uint64(k))
        stretch = members[np.argsort(self.bits[members])]
        self._known = (*self._known[-1:], (k, stretch))  # threads ahead may be in the next one already
        return stretch


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
            self._whole = np.floor(self.weights).astype(np.int64)
            self._total = int(self._whole.sum())
            self._limits = np.ceil(self.weights % 1 * 2.0**53).astype(np.uint64)
        self._ends: list[int] = []  # global position at which each epoch ends; only for weights
        self._known: tuple[tuple[int, Shuffle, np.ndarray | None], ...] = ()

    def epoch(self, epoch: int) -> np.ndarray:
        """The sample indices of an epoch in their order, int64 (length(epoch),)."""
        return self.part(epoch, 0, self.length(epoch))

    def part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at positions start to stop, at most length(epoch), of an epoch, int64."""
        shuffle, pool = self._shuffle(epoch)
        places = shuffle.part(start, min(stop, len(shuffle.bits)))
        return places if pool is None else pool[places]

    def length(self, epoch: int) -> int:
        """How many samples an epoch has: n, or about the sum of the weights."""
        return self.n if self.weights is None else self._total + int(np.count_nonzero(self._extra(epoch)))

    def index(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        return int(self.part(epoch, position, position + 1)[0])

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, position in it) of a position counted from the start of training."""
        if self.weights is None:
            return divmod(position, self.n)
        ends = self._ends  # other threads may look as well: each goes by what it saw
        while not ends or ends[-1] <= position:
            ends = [*ends, (ends[-1] if ends else 0) + self.length(len(ends))]
        if len(ends) > len(self._ends):
            self._ends = ends
        epoch = int(np.searchsorted(ends, position, side="right"))
        return epoch, position - (ends[epoch - 1] if epoch else 0)

    def take(self, start: int, size: int) -> list[int]:
        """The samples at positions start to start + size since training began, across epoch borders."""
        taken: list[int] = []
        while len(taken) < size:
            epoch, position = self.locate(start + len(taken))
            taken += self.part(epoch, position, position + size - len(taken)).tolist()
        return taken

    def _shuffle(self, epoch: int) -> tuple[Shuffle, np.ndarray | None]:
        """The shuffle of an epoch, and the samples that it shuffles where weights choose them."""
        for known, shuffle, pool in self._known:
            if known == epoch:
                return shuffle, pool
        pool = None if self.weights is None else np.repeat(np.arange(self.n), self._counts(epoch))
        shuffle = Shuffle(draw_all(self.seed, epoch, self.n if pool is None else len(pool)))
        self._known = (*self._known[-1:], (epoch, shuffle, pool))  # a batch may lie across two epochs
        return shuffle, pool

    def _counts(self, epoch: int) -> np.ndarray:
        return self._whole + self._extra(epoch)

    def _extra(self, epoch: int) -> np.ndarray:
        """Which samples come once more than their weight's whole part in an epoch, bool (n,)."""
        extra = np.empty(self.n, dtype=bool)
        for start in range(0, self.n, CHUNK):
            stop = min(self.n, start + CHUNK)
            chance = draw(self.seed, epoch, np.arange(start, stop), purpose=1) >> np.uint64(11)  # 53 bits
            extra[start:stop] = chance < self._limits[start:stop]
        return extra


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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, over what decides the order, batch size and seed apart: the samples, the weights."""
        known = getattr(self.dataset, "fingerprint", f"{len(self.dataset)} samples")
        digest = hashlib.sha256(known.encode())
        if self.order.weights is not None:
            digest.update(self.order.weights.tobytes())
        return digest.hexdigest()

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
        samples = [self.dataset[i] for i in self.indices(step)]
        pairs = zip(samples, self._extras(step), strict=True)
        return self.collate([{**s, **extra} if isinstance(s, dict) else s for s, extra in pairs])

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return self.order.locate(step * self.batch_size)[0]

    def stream(self, start_step: int = 0) -> Iterator[Any]:
        """Batches start_step, start_step + 1, ... without end, prepared ahead by threads, one more than they are."""
        if not self.workers:
            yield from map(self.batch, count(start_step))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
        try:
            steps = count(start_step)
            coming: deque[Future] = deque()
            while True:
                while len(coming) <= self.workers:
                    coming.append(pool.submit(self.batch, next(steps)))
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _extras(self, step: int) -> list[dict[str, Any]]:
        """What each sample of this rank's part gets beside what the dataset tells of it."""
        start, size = self._span(step)
        bits = draw(self.seed, 0, np.arange(start, start + size), purpose=2)
        return [{"draw": own} for own in bits.tolist()]

    def _span(self, step: int) -> tuple[int, int]:
        size = self.batch_size // self.world
        return step * self.batch_size + self.rank * size, size
