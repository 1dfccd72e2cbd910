"""A training step of our DiT beside diffusers' PixArt and SD3 transformers: forward, backward and AdamW.

All of one width, depth, heads, tokens and batch, in turn in the same run: eager beside eager, compiled (as a whole, or
block by block) beside compiled. "ours" is the network as configured; "ours, params as PixArt" has a wider MLP, so
that its parameters are within 1 % of PixArt's. SD3 also updates the text, so it has more: the table states all of
them. A third of the text is padding.

"products" is the share of the step that its own matrix products take when run alone, one by one, at the same
shapes and layouts: what is missing to 100 % went into everything else. "mfu" divides the rate by that of square
products measured in the same run (8192 a side on CUDA, 1024 on a CPU).

    python tests/benchmarks/train_step.py                                             # the shipped size, eager
    python tests/benchmarks/train_step.py --modes eager compiled
    python tests/benchmarks/train_step.py --sizes 60m 350m 600m --tokens 256 1024 --batch 64 \
        --kernels sdpa flash efficient cudnn xformers flex --modes compiled           # a GPU
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DTYPES,
    SIZES,
    Shape,
    arguments,
    flops,
    interleaved,
    peak_memory,
    products_of,
    seconds_alone,
    show,
    square_rate,
    train_step,
)
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from diffusionfm.transformer import DiffusionTransformer

Network = tuple[nn.Module, Callable[[], Tensor]]  # a model, and its forward on inputs of its own


def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, text and its mask."""
    torch.manual_seed(0)
    latents = torch.randn(shape.batch, shape.channels, shape.side, shape.side, device=device)
    text = torch.randn(shape.batch, shape.text, shape.text_dim, device=device)
    length = torch.linspace(shape.text / 3, shape.text, shape.batch, device=device)[:, None]
    return (
        latents,
        torch.rand(shape.batch, device=device),
        text,
        torch.arange(shape.text, device=device) < length,
    )


def ours(shape: Shape, device: str, kernel: str = "auto", mlp_ratio: float = 8 / 3) -> Network:
    """Our DiT."""
    with torch.device(device):
        model = DiffusionTransformer(
            shape.channels,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            mlp_ratio=mlp_ratio,
            text_dim=shape.text_dim,
            grid=shape.side // 2,
            attention_kernel=kernel,
        )
    x, t, text, mask = inputs(shape, device)
    return model, lambda: model(x, t, text, mask)


def pixart(shape: Shape, device: str) -> Network:
    """diffusers' PixArt: self-attention, cross-attention to the text, GELU MLP."""
    with torch.device(device):
        model = PixArtTransformer2DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.width // shape.heads,
            in_channels=shape.channels,
            out_channels=shape.channels,
            num_layers=shape.depth,
            cross_attention_dim=shape.width,
            sample_size=shape.side,
            patch_size=2,
            caption_channels=shape.text_dim,
            use_additional_conditions=False,
        )
    x, t, text, mask = inputs(shape, device)
    more = {"resolution": None, "aspect_ratio": None}
    return model, lambda: model(x, text, 1000 * t, more, None, None, mask, return_dict=False)[0]


def sd3(shape: Shape, device: str) -> Network:
    """diffusers' SD3: text and image attend jointly, and both are updated. It takes no text mask."""
    with torch.device(device):
        model = SD3Transformer2DModel(
            sample_size=shape.side,
            patch_size=2,
            in_channels=shape.channels,
            num_layers=shape.depth,
            attention_head_dim=shape.width // shape.heads,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.text_dim,
            caption_projection_dim=shape.width,
            pooled_projection_dim=shape.text_dim,
            out_channels=shape.channels,
            pos_embed_max_size=max(96, shape.side // 2),
        )
    x, t, text, _ = inputs(shape, device)
    return model, lambda: model(x, text, text.mean(1), 1000 * t, return_dict=False)[0]


PEERS = {"PixArt": pixart, "SD3": sd3}


def size(build: Callable[[str], Network]) -> int:
    """Parameters, counted without allocating them."""
    return sum(parameter.numel() for parameter in build("meta")[0].parameters())


def matched_ratio(shape: Shape) -> float:
    """The SwiGLU ratio at which our DiT has as many parameters as PixArt, to the next multiple of 32."""
    missing = size(lambda device: pixart(shape, device)) - size(lambda device: ours(shape, device))
    return 8 / 3 + missing / (3 * shape.width**2 * shape.depth)


def rows_at(shape: Shape, name: str, args: Any) -> list[dict[str, Any]]:
    """One row a network and mode."""
    builds: dict[str, Callable[[str], Network]] = {}
    for kernel in args.kernels:
        builds[f"ours ({kernel})"] = lambda device, kernel=kernel: ours(shape, device, kernel)
    if "PixArt" in args.peers:
        ratio = matched_ratio(shape)
        builds["ours, params as PixArt"] = lambda device: ours(shape, device, args.kernels[0], ratio)
    for peer in args.peers:
        builds[peer] = lambda device, build=PEERS[peer]: build(shape, device)

    dtype, rows = DTYPES[args.dtype], []
    products = {
        key: products_of(lambda d, b=build: train_step(*b(d), d, dtype, False))
        for key, build in builds.items()
    }
    square = square_rate(args.device, dtype)
    alone = {key: seconds_alone(found, args.device, dtype) for key, found in products.items()}
    for mode in args.modes:
        steps, memory = {}, {}
        for key, build in builds.items():
            model, forward = build(args.device)
            if mode == "compiled":
                model.compile(dynamic=False)
            elif mode == "blocks":
                for block in getattr(model, "blocks", None) or model.transformer_blocks:
                    block.compile(dynamic=False)
            steps[key] = train_step(model.train(), forward, args.device, dtype)
        seconds = interleaved(steps, args.device, args.rounds)
        if args.device == "cuda":
            memory = {key: peak_memory(step, args.device) / 2**30 for key, step in steps.items()}
        for key in builds:
            work = flops(products[key])
            row = {"size": name, "tokens": shape.tokens, "batch": shape.batch, "mode": mode, "network": key}
            row |= {"params M": size(builds[key]) / 1e6, "GFLOP": work / 1e9, "ms": 1e3 * seconds[key]}
            row |= {"images/s": shape.batch / seconds[key], "products": f"{alone[key] / seconds[key]:.0%}"}
            row |= {"mfu": f"{work / seconds[key] / square:.0%}", "GiB beyond weights": memory.get(key)}
            if args.peers:
                row["against the faster peer"] = min(seconds[peer] for peer in args.peers) / seconds[key]
            rows.append({key: value for key, value in row.items() if value is not None})
        del steps, model, forward
        gc.collect()
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Time what the command line asks for, print the table and return its rows."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["13m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64], help="image tokens, a square")
    parser.add_argument("--text", type=int, default=32, help="text tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="see diffusionfm.attention.KERNELS")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled", "blocks"), default=["eager"])
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none: time ours alone"
    )
    args = parser.parse_args(argv)
    rows = []
    for name in args.sizes:
        for tokens in args.tokens:
            width, depth, heads = SIZES[name]
            rows += rows_at(Shape(width, depth, heads, tokens, args.text, args.batch), name, args)
    show(rows, args.json)
    return rows


if __name__ == "__main__":
    main()
