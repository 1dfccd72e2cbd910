"""Pictures a second of `generate_batch`, beside loops that call a pipeline, with the same weights in the same run.

"one by one" calls our pipeline for each prompt and saves a PNG; "diffusers" does the same with diffusers' scheduler,
guidance and image processor around our networks, as its own pipelines do, one by one or some at a time; its pictures
are checked against ours. "drawing alone" makes the network calls of the batch and writes nothing: `beyond drawing` is
what the batch takes more than it, for PNGs, syncs and the manifest, and `beyond a plain loop` what it takes more than
drawing and then saving plain PNGs without any protocol. Wall time: run it on a quiet machine.

    python tests/benchmarks/batch.py                                    # the shipped model
    python tests/benchmarks/batch.py --overhead --pictures 48 --batch-sizes 8         # what the protocol costs
    python tests/benchmarks/batch.py --pictures 512 --batch-sizes 8 16 32 64 128 --rounds 3           # a GPU
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DTYPES, arguments, interleaved, show
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from diffusionfm.batch import generate_batch
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.text import encode_prompts

THINGS = ("apple", "house", "cat", "key", "star", "rocket", "tree", "fish")
COLORS = ("red", "blue", "green", "yellow")


class Bench:
    """The ways to make the same pictures; each function writes them to a new folder, which it gives back."""

    def __init__(self, pipe: DiffusionFMPipeline, pictures: int, home: Path):
        self.pipe = pipe
        self.home = home
        self.prompts = [f"a {COLORS[k // len(THINGS) % 4]} {THINGS[k % 8]}, {k}" for k in range(pictures)]
        self.rows = [{"id": str(k), "prompt": prompt, "seed": k} for k, prompt in enumerate(self.prompts)]
        self.processor = VaeImageProcessor(do_normalize=False)

    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.home))

    def batch(self, size: int) -> Path:
        """As the command makes them."""
        out = self.folder()
        generate_batch(self.rows, self.pipe, out, batch_size=size, sheets=0, progress=False)
        return out

    def loop(
        self, size: int, save: bool = True, draw: Callable[..., list[Image.Image]] | None = None
    ) -> Path:
        """A call for each `size` prompts, and a plain PNG for each picture unless not to be saved."""
        out = self.folder()
        for start in range(0, len(self.prompts), size):
            seeds = list(range(start, min(start + size, len(self.prompts))))
            images = (draw or self.ours)([self.prompts[k] for k in seeds], seeds)
            for seed, image in zip(seeds, images, strict=True):
                if save:
                    image.save(out / f"{seed}.png")
        return out

    def ours(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return self.pipe(prompts, seed=seeds, batch_size=len(prompts)).images

    @torch.inference_mode()
    def diffusers(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """As a diffusers pipeline draws: encode, concatenate for guidance, step the scheduler, decode, process."""
        pipe, defaults = self.pipe, self.pipe.defaults
        both = [*prompts, *[""] * len(prompts)]
        text, mask, _ = encode_prompts(pipe.tokenizer, pipe.text_encoder, both, pipe.device)
        unit = pipe.vae.downsample
        shape = (1, pipe.vae.latent_channels, defaults["height"] // unit, defaults["width"] // unit)
        noise = [randn_tensor(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.cat(noise).to(pipe.device)
        sigmas = np.linspace(1, 1 / defaults["steps"], defaults["steps"])
        pipe.scheduler.set_timesteps(sigmas=sigmas, device=pipe.device)
        for t in pipe.scheduler.timesteps:
            time = (t / 1000).expand(len(both))
            v = pipe.transformer(torch.cat([x] * 2).to(pipe.transformer.dtype), time, text, mask).float()
            cond, uncond = v.chunk(2)
            x = pipe.scheduler.step(uncond + defaults["guidance"] * (cond - uncond), t, x, return_dict=False)[
                0
            ]
        pixels = pipe.vae.decode(x.to(pipe.vae.dtype)).float().clamp(0, 1)
        return [Image.fromarray(picture, "RGBA") for picture in self.uint8(pixels)]

    def uint8(self, pixels: torch.Tensor) -> np.ndarray:
        return (self.processor.pt_to_numpy(pixels) * 255).round().astype(np.uint8)


def furthest(one: Path, two: Path) -> int:
    """The largest difference between the pictures of two folders, of 255."""
    gaps = []
    for file in one.glob("*.png"):
        with Image.open(file) as a, Image.open(two / file.name) as b:
            gaps.append(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())
    return int(max(gaps))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Time every way, print the table and return its rows."""
    parser = arguments(__doc__)
    parser.set_defaults(dtype="fp32", rounds=3)
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder; the shipped model")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--overhead", action="store_true", help="time the batch and the plain loop alone")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args(argv)
    pipe = DiffusionFMPipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype], device=args.device)
    home = Path(tempfile.mkdtemp())
    try:
        bench = Bench(pipe, args.pictures, home)
        largest = max(args.batch_sizes)
        calls: dict[str, Callable[[], Any]] = {}
        if not args.overhead:
            gap = furthest(bench.loop(1), bench.loop(1, draw=bench.diffusers))
            calls["one by one"] = lambda: bench.loop(1)
            calls["diffusers, one by one"] = lambda: bench.loop(1, draw=bench.diffusers)
            calls[f"diffusers, {largest} at a time"] = lambda: bench.loop(largest, draw=bench.diffusers)
        for size in args.batch_sizes:
            calls[f"batch, {size} at a time"] = lambda size=size: bench.batch(size)
            calls[f"plain loop, {size}"] = lambda size=size: bench.loop(size)
            if not args.overhead:
                calls[f"drawing alone, {size}"] = lambda size=size: bench.loop(size, save=False)
        seconds = interleaved(calls, args.device, args.rounds)
    finally:
        shutil.rmtree(home)
    rows = []
    for name in calls:
        row: dict[str, Any] = {"way": name, "pictures/s": args.pictures / seconds[name]}
        if not args.overhead:
            row["times one by one"] = seconds["one by one"] / seconds[name]
            row["times diffusers"] = seconds["diffusers, one by one"] / seconds[name]
        if name.startswith("batch"):
            size = int(name.split()[1])
            if not args.overhead:
                row["beyond drawing"] = f"{seconds[name] / seconds[f'drawing alone, {size}'] - 1:.1%}"
            row["beyond a plain loop"] = f"{seconds[name] / seconds[f'plain loop, {size}'] - 1:.1%}"
        if name == "diffusers, one by one":
            row["differs from ours, of 255"] = gap
        rows.append(row)
    show(rows, args.json)
    return rows


if __name__ == "__main__":
    main()
