"""What a training loop stands on: step seeds, the pieces of a batch, signals."""

import atexit
import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Batch = dict[str, Any]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step on one rank, so that no random state needs saving."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1


def finite(value: float) -> bool:
    """Whether a number is neither nan nor infinite."""
    return value - value == 0.0


def count(batch: Batch) -> int:
    """How many samples a batch holds: the length that all its tensors and lists share."""
    sizes = {len(value) for value in batch.values() if isinstance(value, list) or _rows(value)}
    if len(sizes) != 1:
        raise ValueError(
            f"tensors and lists of a batch have one entry a sample, but these lengths differ: {sorted(sizes)}"
        )
    return sizes.pop()


def _rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def split(batch: Batch, pieces: int) -> list[Batch]:
    """The batch cut along its samples into equal pieces."""
    if pieces == 1:
        return [batch]
    total = count(batch)
    if total % pieces:
        raise ValueError(f"a batch of {total} does not split into trainer.grad_accum={pieces} equal pieces")
    size = total // pieces
    cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
    return [{k: v[c] if isinstance(v, list) or _rows(v) else v for k, v in batch.items()} for c in cuts]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` inside the `with` block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def repeated_blocks(objective: nn.Module) -> list[nn.Module]:
    """The blocks that its networks repeat, by the class names that each network lists in `_repeated_blocks`."""
    return [
        block
        for network in objective.modules()
        for block in network.modules()
        if type(block).__name__ in (getattr(network, "_repeated_blocks", None) or ())
    ]


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """What every rank has, in order of ranks, on every rank; JSON-able, so that nothing is unpickled."""
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device))
    longest = max(int(size) for size in sizes)
    sent = torch.zeros(longest, dtype=torch.uint8, device=device)
    sent[: len(text)] = text
    got = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(got, sent)
    parts = zip(got, sizes, strict=True)
    return [json.loads(bytes(part[: int(size)].cpu().numpy())) for part, size in parts]


@cache
def leave_group_at_exit() -> None:
    """Close the process group, if there is one, when Python ends: its threads, if running, may abort a finished rank.

    Call it where no collective is under way. A rank that fails leaves its group as it is and waits for nobody."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
