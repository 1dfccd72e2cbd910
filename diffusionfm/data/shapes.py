"""A toy corpus of drawn coloured shapes with exact captions, for trying the whole way in minutes.

python -m diffusionfm.data.shapes --out runs/tiny/shards [--count 2000] [--size 32]
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffusionfm.colors import COLORS, rgb
from diffusionfm.config import user_errors
from diffusionfm.data.icons.captions import is_held_out, pick_background
from diffusionfm.data.shards import ShardWriter
from diffusionfm.phrasing import article, on_background

OVERSAMPLE = 8
BACKGROUNDS = 0.35
HELD_OUT = 0.1
Point = tuple[float, float]
Outline = Callable[[], list[Point]]


def _radial(radius: Callable[[float], float], points: int = 96) -> list[Point]:
    """The closed curve of a radius by angle, an angle of 0 pointing up."""
    angles = [2 * math.pi * k / points for k in range(points)]
    return [(radius(a) * math.sin(a), -radius(a) * math.cos(a)) for a in angles]


def _polygon(corners: int) -> list[Point]:
    return _radial(lambda angle: 1.0, corners)


def _star(arms: int, inner: float) -> list[Point]:
    radii = [1.0, inner] * arms
    return _radial(lambda angle: radii[round(angle / math.pi * arms)], 2 * arms)


def _heart() -> list[Point]:
    turns = [2 * math.pi * k / 96 for k in range(96)]
    wave = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
    return [(math.sin(t) ** 3, -sum(w * math.cos(n * t) for w, n in wave) / 16) for t in turns]


def _moon() -> list[Point]:
    arc = [math.pi * k / 48 for k in range(49)]
    outer = [(-math.sin(a), -math.cos(a)) for a in arc]
    return outer + [(-0.35 * math.sin(a), -math.cos(a)) for a in reversed(arc)]


SHAPES: dict[str, Outline] = {
    "circle": lambda: _radial(lambda angle: 1.0),
    "square": lambda: [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": lambda: _polygon(3),
    "diamond": lambda: [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)],
    "hexagon": lambda: _polygon(6),
    "star": lambda: _star(5, 0.42),
    "heart": _heart,
    "cross": lambda: [
        (x * s, y * t)
        for s, t, corner in ((1, -1, 0), (1, 1, 1), (-1, 1, 0), (-1, -1, 1))
        for x, y in [((0.3, 1), (0.3, 0.3), (1, 0.3)), ((1, 0.3), (0.3, 0.3), (0.3, 1))][corner]
    ],
    "flower": lambda: _radial(lambda angle: 0.7 + 0.3 * math.cos(5 * angle)),
    "moon": _moon,
}
"""Shape word -> its outline, points (x, y) within [-1, 1], y down."""


def draw_shape(
    shape: str, color: str, size: int, center: Point = (0.5, 0.5), radius: float = 0.4
) -> Image.Image:
    """One shape of SHAPES in one colour of COLORS: `size` x `size` straight RGBA, smooth edges, clear around it.

    center and radius are shares of the side.
    """
    scale = size * OVERSAMPLE
    points = [
        ((center[0] + radius * x) * scale, (center[1] + radius * y) * scale) for x, y in SHAPES[shape]()
    ]
    alpha = Image.new("L", (scale, scale), 0)
    ImageDraw.Draw(alpha).polygon(points, fill=255)
    alpha = alpha.resize((size, size), Image.Resampling.BOX)
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    ink = Image.new("RGBA", (size, size), (*rgb(color), 255))
    ink.putalpha(alpha)
    picture.paste(ink, mask=alpha.point(lambda a: 255 if a else 0))
    return picture


def shape_samples(count: int, size: int, seed: int) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
    """(key, RGBA picture, caption, meta) of `count` samples: a pure function of the arguments.

    Each shape and colour comes about equally often; a phrase such as "red heart" is held out or trained on, whole.
    """
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % len(kinds) == 0:
            order = rng.permutation(len(kinds))
        shape, color = kinds[order[number % len(kinds)]]
        radius = float(rng.uniform(0.3, 0.45))
        center = float(rng.uniform(radius, 1 - radius)), float(rng.uniform(radius, 1 - radius))
        picture = draw_shape(shape, color, size, center, radius)
        background = pick_background(rgb(color), rng) if rng.random() < BACKGROUNDS else None
        if background:
            square = Image.new("RGBA", (size, size), (*rgb(background), 255))
            square.alpha_composite(picture)
            picture = square
        phrase = f"{color} {shape}"
        on = on_background(background) if background else ""
        captions = [f"{lead}{on}" for lead in (f"a shape of {article(phrase)}", article(phrase), phrase)]
        yield f"{number:08d}", picture, captions[0], {
            "source": "shapes",
            "package": "diffusionfm",
            "version": "1",
            "licence": "CC0-1.0",
            "attribution": "drawn by diffusionfm.data.shapes",
            "name": f"{shape}-{color}".replace(" ", "-"),
            "phrase": phrase,
            "keywords": [shape, color],
            "style": "shape",
            "palette": "mono",
            "background": background,
            "background_hex": COLORS[background] if background else None,
            "ink": color,
            "ink_hex": COLORS[color],
            "split": "heldout" if is_held_out(phrase, HELD_OUT) else "train",
            "captions": captions,
        }  # fmt: skip


def build_shapes(
    out: str | os.PathLike[str], count: int = 2000, size: int = 32, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write `count` shapes of `size` x `size` pixels as shards at `out`; returns it.

    The same arguments give the same bytes. ValueError when `out` holds shards already, unless `overwrite`.
    """
    if size < 16 or size % 8:
        raise ValueError(f"size is {size}; it must be a multiple of 8, 16 or more")
    with ShardWriter(out, samples_per_shard=1000, overwrite=overwrite) as writer:
        for key, picture, caption, meta in shape_samples(count, size, seed):
            writer.write(key, picture, caption, meta)
    return Path(out)


def main(argv: list[str] | None = None) -> int:
    """The command line: write the shards, say how many."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusionfm.data.shapes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", required=True, help="folder of shards to write")
    parser.add_argument("--count", type=int, default=2000, help="pictures (default 2000)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    args = parser.parse_args(argv)
    with user_errors():
        build_shapes(args.out, args.count, args.size, args.seed, args.overwrite)
    print(f"{args.count} shapes of {args.size} x {args.size} pixels in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
