"""Peak memory of attention alone and of a whole training step, against tokens and batch, for each kernel.

On CUDA the allocator's own peak; on a CPU that of every tensor allocated and released, as torch's profiler saw them.
"growth" is the peak over that of the row before it, which has fewer tokens: 4 times the tokens take 4 times the
memory of a kernel that is linear in them, and 16 times that of one that writes its scores out.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --sizes 350m --tokens 256 1024 4096 --batches 8 32 \
        --kernels sdpa flash efficient cudnn xformers flex math matmul                # a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import DTYPES, SIZES, Shape, arguments, peak_memory, show, train_step
from train_step import ours

from diffusionfm.attention import KERNELS, attention


def attention_alone(shape: Shape, kernel: str, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of one attention over the image and its text, some of it padding."""
    keys = shape.text + shape.tokens
    heads = (shape.heads, shape.width // shape.heads)
    q = torch.randn(shape.batch, shape.tokens, *heads, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(shape.batch, keys, *heads, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    mask = torch.ones(shape.batch, keys, dtype=torch.bool, device=device)
    mask[:, : shape.text // 2] = False

    def call() -> None:
        attention(q, k, v, mask, kernel).sum().backward()

    return call


def whole_step(
    shape: Shape, kernel: str, device: str, dtype: torch.dtype, checkpointing: bool
) -> Callable[[], None]:
    """A training step of our DiT, weights and optimiser state apart."""
    model, forward = ours(shape, device, kernel)
    if checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    return train_step(model.train(), forward, device, dtype)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print the table and return its rows."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["13m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="image tokens, squares")
    parser.add_argument("--text", type=int, default=32, help="text tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[2])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["sdpa", "flash", "matmul"])
    args = parser.parse_args(argv)
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            for kernel in args.kernels:
                rows += grown(size, batch, kernel, args)
    show(rows, args.json)
    return rows


def grown(size: str, batch: int, kernel: str, args: Any) -> list[dict[str, Any]]:
    """A row for each number of tokens, of attention alone, the step, and the step with activation checkpointing."""
    width, depth, heads = SIZES[size]
    dtype = DTYPES[args.dtype]
    makers: dict[str, Callable[[Shape], Callable[[], None]]] = {
        "attention": lambda shape: attention_alone(shape, kernel, args.device, dtype),
        "step": lambda shape: whole_step(shape, kernel, args.device, dtype, False),
        "step, checkpointing": lambda shape: whole_step(shape, kernel, args.device, dtype, True),
    }
    rows = []
    for what, make in makers.items():
        before = None
        for tokens in sorted(args.tokens):
            call = make(Shape(width, depth, heads, tokens, args.text, batch))
            call()  # gradients and optimiser state are there from now on
            peak = peak_memory(call, args.device) / 2**20
            row = {
                "size": size,
                "what": what,
                "kernel": kernel,
                "batch": batch,
                "tokens": tokens,
                "peak MiB": peak,
            }
            rows.append(row | {"growth": peak / before if before else None})
            before = peak
    return rows


if __name__ == "__main__":
    main()
