"""One function over many items on the workers of a Ray cluster, or of this machine; a killed worker costs a retry.

Plain tasks, not Ray Data: an item is a whole shard that its worker reads and writes itself, so nothing flows between
the stages that Ray Data would stream, and tasks start in half the time and say how often they are tried again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 3  # of an item whose worker died: more is no accident, but an item that kills
OBJECT_STORE = 100 * 2**20  # bytes; only names and counts go through it


def each(work: Callable[[Item], Result], items: Iterable[Item], workers: int = 0) -> Iterator[Result]:
    """Results of work(item) for every item, in the order in which they come.

    work: harmless when run twice on one item; a worker process is told it once. What it raises is raised here.
    workers: how many at a time; 0 for one a GPU, or one a core of a cluster without any. Each takes a GPU where
        there are some.
    Joins the cluster that RAY_ADDRESS names; without it, starts one of this machine alone.
    ValueError when ray is not installed, or an item's worker dies again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "ray is not installed: pip install 'diffusionfm[ray]', or take the local engine"
        ) from error
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", object_store_memory=OBJECT_STORE, include_dashboard=False, logging_level="warning")

    def job(item: Item) -> Result:  # its name is that of the worker's process while it is at it
        return work(item)

    try:
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        at_once = workers or gpus or int(has["CPU"])
        # max_calls=0: a worker with a GPU also stays for the next item, its networks loaded.
        options = {"num_cpus": 1, "num_gpus": min(gpus, 1), "max_retries": RETRIES, "max_calls": 0}
        task = ray.remote(**options)(job)
        coming = iter(items)
        running = [task.remote(item) for item in islice(coming, at_once)]
        while running:
            done, running = ray.wait(running)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.WorkerCrashedError as error:
                raise ValueError(
                    f"a worker died {RETRIES + 1} times over one item: out of memory?"
                ) from error
            running += [task.remote(item) for item in islice(coming, 1)]
    finally:
        ray.shutdown()
