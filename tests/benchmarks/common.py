"""What the benchmarks share: shapes, a step to time, interleaved clocks, the matrix products in a call, tables."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The size of a denoiser and of what it reads: latents of 16 channels, patches of 2, text 256 wide."""

    width: int = 384
    depth: int = 6
    heads: int = 6
    tokens: int = 64
    text: int = 32
    batch: int = 32
    channels: int = 16
    text_dim: int = 256

    @property
    def side(self) -> int:
        """Latent pixels a side: two a token."""
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise SystemExit(f"--tokens takes squares (64, 256, 1024), not {self.tokens}")
        return 2 * side


SIZES = {  # width, depth, heads
    "tiny": (64, 4, 2),
    "13m": (384, 6, 6),
    "60m": (576, 12, 9),
    "350m": (1024, 24, 16),
    "600m": (1280, 26, 20),
}


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """bf16 autocast over fp32 weights, as the trainer runs; nothing for fp32."""
    return torch.autocast(device, dtype, enabled=dtype is not torch.float32)


# ---- clocks ----------------------------------------------------------------------------------------------


def clock(device: str) -> float:
    """Seconds. One thread on a CPU is timed by its processor time, so that a busy machine does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each call over `rounds` rounds of all of them in turn, after two calls to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            began = clock(device)
            call()
            if number >= 2:
                spent[name].append(clock(device) - began)
    return {name: statistics.median(times) for name, times in spent.items()}


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call has allocated at its peak, beyond what was there before.

    On CUDA the allocator's own count, on a CPU every tensor's allocation and release as the profiler saw it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    )
    return max(live, default=0)


# ---- the matrix products in a call -----------------------------------------------------------------------

Product = tuple[
    tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]
]  # shapes and strides of a, b


class Products(TorchDispatchMode):
    """Counts the matrix products run inside the `with` block, a backward's too, by shape and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()
        self.spelled_out = _SpelledOutAttention()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            self.found[tuple(a.shape), tuple(b.shape), a.stride(), b.stride()] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.spelled_out.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.spelled_out.__exit__(*error)


class _SpelledOutAttention(TorchFunctionMode):
    """Attention as its two products, whatever kernel the model asks for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return (q @ k.mT).softmax(-1) @ v
        return func(*args, **kwargs)


def products_of(build: Callable[[str], Callable[[], Any]]) -> Counter[Product]:
    """The products of `build("meta")()`: shapes alone, so that any size costs nothing."""
    call = build("meta")
    with Products() as counted:
        call()
    return counted.found


def flops(products: Counter[Product]) -> float:
    """Operations of these products, a multiplication and an addition counted as two."""
    return sum(2.0 * math.prod(a) * b[-1] * count for (a, b, _, _), count in products.items())


def seconds_alone(products: Counter[Product], device: str, dtype: torch.dtype, rounds: int = 3) -> float:
    """The time that these products take when nothing else is run between them: the sum of their medians."""
    total = 0.0
    for (a, b, stride_a, stride_b), count in products.items():
        x, y = _filled(a, stride_a, device, dtype), _filled(b, stride_b, device, dtype)
        repeats = min(50, 1 + int(2e8 / (2.0 * math.prod(a) * b[-1])))  # of small ones, many at a time

        def call(x: Tensor = x, y: Tensor = y, repeats: int = repeats) -> None:
            for _ in range(repeats):
                torch.matmul(x, y)

        total += count * interleaved({"": call}, device, rounds)[""] / repeats
    return total


def square_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products, 8192 a side on CUDA and 1024 on a CPU, by the same clock as the steps."""
    n = 8192 if device == "cuda" else 1024
    one = Counter({((n, n), (n, n), (n, 1), (n, 1)): 1})
    return flops(one) / seconds_alone(one, device, dtype)


def _filled(shape: tuple[int, ...], stride: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Random numbers in that layout, also one where an expanded axis has stride 0."""
    needed = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(needed, device=device, dtype=dtype).as_strided(shape, stride)


# ---- a training step -------------------------------------------------------------------------------------


def train_step(
    model: nn.Module, forward: Callable[[], Tensor], device: str, dtype: torch.dtype, optimizer: bool = True
) -> Callable[[], None]:
    """Forward, squared error, backward and one fused AdamW step as a function without arguments."""
    update = (
        torch.optim.AdamW(model.parameters(), 1e-4, fused=device in ("cpu", "cuda")) if optimizer else None
    )

    def step() -> None:
        with autocast(device if device != "meta" else "cpu", dtype):
            out = forward()
        out.float().square().mean().backward()
        if update is not None:
            update.step()
            update.zero_grad()

    return step


# ---- tables ----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Date, processor, versions and commit: what a figure means nothing without."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "commit": commit or "unknown",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def show(rows: list[dict[str, Any]], path: str | None = None) -> None:
    """Print rows as a Markdown table under a line about the machine; to `path`, if any, as JSON too."""
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items()) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, ["---"] * len(names)] + [[_text(row.get(name)) for name in names] for row in rows]
    for line in table:
        print("| " + " | ".join(line) + " |")
    if path:
        Path(path).write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --device, --dtype, --rounds, --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    return parser
