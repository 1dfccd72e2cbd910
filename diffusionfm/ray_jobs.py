"""One function over many items on the workers of a Ray cluster, or of this machine; a killed worker costs a retry.

Plain tasks, not Ray Data: an item is a whole shard that its worker reads and writes itself, so nothing flows between
the stages that Ray Data would stream, and tasks start in half the time and say how often they are tried again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Lost = Callable[[Item, str], tuple[list[Item], list[Result]]]

RETRIES = 3  # of an item whose worker died: more is no accident, but an item that kills
OBJECT_STORE = 100 * 2**20  # bytes; only names and counts go through it


def each(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int = 0,
    lost: Lost[Item, Result] | None = None,
) -> Iterator[Result]:
    """Results of work(item) for every item, in the order in which they come.

    work: harmless when run twice on one item; a worker process is told it once. What it raises is raised here.
    workers: how many at a time; 0 for one a GPU, or one a core of a cluster without any. Each takes a GPU where
        there are some.
    lost: given an item whose worker dies again and again, and why: smaller ones to do in its place, and results for
        what can be no smaller; None ends the work.
    Joins the cluster that RAY_ADDRESS names; without it, starts one of this machine alone.
    ValueError when ray is not installed, an item is lost for good, or the cluster fails.
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
        coming, again = iter(items), deque[Item]()
        running = {task.remote(item): item for item in islice(coming, at_once)}
        while running:
            done, _ = ray.wait(list(running))
            smaller, results = _outcome(done[0], running.pop(done[0]), lost)
            yield from results
            again.extend(smaller)
            while len(running) < at_once and (more := [again.popleft()] if again else [*islice(coming, 1)]):
                running[task.remote(more[0])] = more[0]
    finally:
        ray.shutdown()


def _outcome(done: Any, item: Item, lost: Lost[Item, Result] | None) -> tuple[list[Item], list[Result]]:
    """What an item that is done gave: smaller ones in its place, and results."""
    import ray

    try:
        return [], [ray.get(done)]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        why = f"a worker died {RETRIES + 1} times over one item: out of memory?"
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            why = "a worker ran out of memory over one item"
        if lost is None:
            raise ValueError(why) from error
        return lost(item, why)
    except ray.exceptions.RayError as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"the Ray cluster failed ({said}): see to it, then run the same command again"
        ) from error
