"""What a person asks for, in the library's words, and the PNG files that answer it."""

from __future__ import annotations

from diffusionfm import __version__
from diffusionfm.drawing import Pictures
from diffusionfm.images import encode_png
from diffusionfm.phrasing import in_style, on_background
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.jobs import Request

MAX_SEED = 2**53 - 1
"""The largest seed a browser's numbers hold exactly."""
MAX_COUNT, MAX_STEPS, MAX_GUIDANCE, MAX_PROMPT = 8, 100, 20.0, 2000
NOTHING, AS_WRITTEN = "transparent", "as the prompt says"
STYLES = [
    "flat emoji",
    "3D emoji",
    "round emoji",
    "blob emoji",
    "cartoon emoji",
    "outlined emoji",
    "clip art",
    "sticker",
    "flat icon",
    "gradient icon",
    "plump icon",
    "hand drawn icon",
    "low poly icon",
    "colored line icon",
    "pixel icon",
    "stencil icon",
    "map icon",
]
"""Styles as the shipped model's captions name them."""


def compose(prompt: str, style: str = AS_WRITTEN, background: str = NOTHING) -> str:
    """The prompt with the pickers' words as captions have them: STYLE of PROMPT on a COLOUR background."""
    words = " ".join(prompt.split())
    if style != AS_WRITTEN:
        words = in_style(style, words)
    if background != NOTHING:
        words += on_background(background)
    return words


def asked_for(
    prompt: str, negative: str | None, seed: int, steps: int, guidance: float, count: int
) -> Request:
    """What the controls ask for."""
    return Request(
        prompt,
        (negative or "").strip(),
        num_images=int(count),
        seed=int(seed),
        steps=int(steps),
        guidance=float(guidance),
    )


def encode(pipe: DiffusionFMPipeline, asked: Request, pictures: Pictures) -> list[bytes]:
    """The result's pictures as PNG files, alpha kept, each with all it takes to draw it again."""
    common = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "model": pipe.model_name,
        "version": __version__,
    }
    return [
        encode_png(image, common | {"seed": seed, "width": image.width, "height": image.height})
        for image, seed in zip(pictures.images, pictures.seeds, strict=True)
    ]


def seeds_in_words(seeds: list[int]) -> str:
    """`seed 7`, or `seeds 7 to 10`."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
