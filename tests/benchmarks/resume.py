"""How long a run takes to find its place again, against the size of its data.

`seek` is the order alone: from nothing to the samples of a step in the middle of the eighth epoch, plain, weighted and
in buckets. For sizes up to --shards-to real shards are written (latents of a few bytes, as tars hold them) and read:
`open` lists the samples by the parquets, `open by headers` by every header of every tar, and `first batch` reads the
first batch of that step. Seconds by the wall clock; the tars are then in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import show

from diffusionfm.data.buckets import BucketBatches, BucketConfig
from diffusionfm.data.order import Batches, Order
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shards import ShardWriter

BATCH = 256
EPOCHS = 7.5


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every size, then print and return the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--shards-to", type=int, default=10**5, help="largest size written as real shards")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args(argv)
    rows = []
    for samples in args.samples:
        row: dict[str, Any] = {"samples": samples, **seeks(samples)}
        if samples <= args.shards_to:
            with tempfile.TemporaryDirectory() as folder:
                row |= reads(Path(folder), samples)
        rows.append(row)
    show(rows, args.json)
    return rows


def seeks(samples: int) -> dict[str, float]:
    """Seconds to the samples of one step, by order alone."""
    start = int(samples * EPOCHS)
    weights = np.random.default_rng(0).random(samples) * 2
    shapes = np.random.default_rng(1).choice([8, 12, 16], (samples, 2))
    cfg = BucketConfig(tokens=64 * BATCH, sides=[16], multiple=4, patch=2)
    seconds, taken = timed(lambda: Order(samples, 0).take(start, BATCH))
    assert len(taken) == BATCH
    weighted, _ = timed(lambda: Order(samples, 0, weights).take(start, BATCH))
    batches = BucketBatches(range(samples), list, shapes, cfg, 8, seed=0)
    bucketed, _ = timed(lambda: batches.indices(start // BATCH))
    return {"seek (s)": seconds, "seek, weighted (s)": weighted, "seek, in buckets (s)": bucketed}


def reads(folder: Path, samples: int) -> dict[str, float]:
    """Seconds until real shards of so many samples are open, and until the first batch is there."""
    with ShardWriter(folder, samples_per_shard=10_000) as writer:
        for i in range(samples):
            meta = {"split": "train", "source": f"s{i % 3}"}
            writer.write_members(f"k{i:08d}", {"safetensors": b"12345678"}, f"number {i}", meta)
    needs = ("safetensors", "txt")
    opened, dataset = timed(lambda: ShardDataset(folder, split="train", needs=needs))
    first, _ = timed(lambda: Batches(dataset, list, BATCH, seed=0).batch(int(samples * EPOCHS) // BATCH))
    by_headers, _ = timed(lambda: ShardDataset(folder, needs=needs))
    return {"open (s)": opened, "first batch (s)": first, "open by headers (s)": by_headers}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it gave."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
