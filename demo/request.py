"""What a person asks for, in the library's words, and the files that answer it."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from diffusionfm.checks import SIZE
from diffusionfm.drawing import Pictures
from diffusionfm.formats import trace
from diffusionfm.images import encode_png
from diffusionfm.inputs import HANDED_BYTES
from diffusionfm.phrasing import in_style, on_background
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.jobs import Request

MAX_SEED = 2**53 - 1
"""The largest seed a browser's numbers hold exactly."""
MAX_COUNT, MAX_STEPS, MAX_GUIDANCE, MAX_PROMPT = 8, 100, 20.0, 2000
USUAL = 512
"""Pixels a side that a picture has at first, where the model's decoder goes so far: a page shows it about as large."""
NOTHING, AS_WRITTEN = "transparent", "as the prompt says"


def compose(prompt: str, style: str = AS_WRITTEN, background: str = NOTHING) -> str:
    """The prompt with the pickers' words as captions have them: STYLE of PROMPT on a COLOUR background."""
    words = " ".join(prompt.split())
    if style != AS_WRITTEN:
        words = in_style(style, words)
    if background != NOTHING:
        words += on_background(background)
    return words


def asked_for(
    prompt: str,
    negative: str | None,
    seed: int,
    steps: int,
    guidance: float,
    count: int,
    size: str = "",
) -> Request:
    """What the controls ask for; size: as `size_name` has it, "" for the model's own."""
    width, height = map(int, size.split(" × ")) if size else (None, None)
    return Request(
        prompt,
        (negative or "").strip(),
        num_images=int(count),
        seed=int(seed),
        steps=int(steps),
        guidance=float(guidance),
        width=width,
        height=height,
    )


def size_name(width: int, height: int) -> str:
    """As the picker shows it."""
    return f"{width} × {height}"


def sizes(pipe: DiffusionFMPipeline, unit: int = 16) -> list[str]:
    """The sizes one can pick: the model's own, about as many pixels wide and tall, and as much larger as it can."""
    width, height = pipe.defaults["width"], pipe.defaults["height"]
    long, short = (round(side * share / unit) * unit for side, share in ((width, 1.25), (height, 0.75)))
    pairs = dict.fromkeys([(width, height), (long, short), (short, long)])
    larger = [(scale * wide, scale * high) for scale in pipe.vae.scales for wide, high in pairs]
    return [size_name(*pair) for pair in larger if max(pair) <= SIZE[1]]


def in_range(told: dict[str, Any]) -> dict[str, Any]:
    """What is told of seed, steps and guidance, as the controls can hold it; NaN is left out."""
    ranges = {"seed": (0, MAX_SEED), "steps": (1, MAX_STEPS), "guidance": (0.0, MAX_GUIDANCE)}
    return {
        name: min(max(told[name], least), most)
        for name, (least, most) in ranges.items()
        if name in told and told[name] == told[name]
    }


def usual_size(pipe: DiffusionFMPipeline) -> str:
    """The size that Create begins with: the largest of the model's own shape, up to USUAL pixels."""
    return size_name(*pipe.size_for(USUAL))


# ------------------------------------------------------------------ files


def encode(pictures: Pictures, metadata: bool = True) -> list[bytes]:
    """The pictures as PNG files, alpha kept, each telling how it was made; with no metadata, nothing but pixels."""
    return [
        encode_png(image, told if metadata else None)
        for image, told in zip(pictures.images, pictures.told, strict=True)
    ]


def svg(pictures: Pictures, number: int, metadata: bool = True) -> bytes:
    """Picture `number`, traced; metadata: as of `encode`."""
    return trace(pictures.images[number], parameters=pictures.told[number] if metadata else None)


def zip_of(pictures: Pictures, prompt: str, metadata: bool = True) -> bytes:
    """A ZIP of every picture, as PNG and as SVG, named after the prompt; metadata: as of `encode`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k, (data, seed) in enumerate(zip(encode(pictures, metadata), pictures.seeds, strict=True)):
            archive.writestr(f"{file_name(prompt, seed)}.png", data)
            traced = svg(pictures, k, metadata)
            archive.writestr(f"{file_name(prompt, seed)}.svg", traced, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def small(file: str) -> Path:
    """An uploaded file that holds a picture or rows; ValueError, nothing of it read, for one of over HANDED_BYTES."""
    if os.path.getsize(file) > HANDED_BYTES:
        raise ValueError(f"the file is too large: {HANDED_BYTES // 10**6} MB at most, so save it smaller")
    return Path(file)


def file_name(prompt: str, seed: int | None = None) -> str:
    """Of a picture's file, without its suffix: red-apple-7."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
    return name if seed is None else f"{name}-{seed}"


def seeds_in_words(seeds: list[int]) -> str:
    """`seed 7`, or `seeds 7 to 10`."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
