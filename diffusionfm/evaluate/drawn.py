"""Pictures right, or wrong in one thing, by construction: plain shapes that rules are tested on, and controls."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from diffusionfm.colors import COLORS, rgb
from diffusionfm.evaluate.masks import oklab
from diffusionfm.evaluate.rules import OPPOSITES, RELATIONS, Scene
from diffusionfm.outlines import OUTLINES

OVERSAMPLE = 4
STANDS_OFF = 0.3  # OKLab distance of an unnamed ink from the ground


def draw_scene(scene: Scene, size: int = 128, outline: bool = False, gradient: bool = False) -> Image.Image:
    """The scene in smooth-edged shapes, straight-alpha RGBA.

    outline: black lines around the shapes. gradient: shapes fall from their colour's tint to its shade.
    A thing that is no shape of the table is drawn as a circle.
    """
    big = size * OVERSAMPLE
    picture = Image.new(
        "RGBA", (big, big), (*rgb(scene.background), 255) if scene.background else (0, 0, 0, 0)
    )
    for (color, shape), (x, y, radius) in zip(scene.things, places(scene), strict=True):
        corners = [
            (big * (x + radius * across), big * (y + radius * down))
            for across, down in OUTLINES.get(shape, OUTLINES["circle"])
        ]
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        picture.paste(_paint(rgb(color or unnamed_ink(scene.background)), big, gradient), (0, 0), mask)
        if outline:
            line = [*corners, corners[0], corners[1]]
            ImageDraw.Draw(picture).line(line, fill=(17, 17, 17, 255), width=big // 64, joint="curve")
    return picture.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def places(scene: Scene) -> list[tuple[float, float, float]]:
    """Centre and radius of each thing, in sides of the picture."""
    count = len(scene.things)
    if scene.relation:
        across, down = RELATIONS[scene.relation]
        return [(0.5 + s * 0.24 * across, 0.5 + s * 0.24 * down, 0.2) for s in (1, -1)]
    if count == 1:
        return [(0.5, 0.5, 0.42)]
    if count == 2:
        return [(0.27, 0.5, 0.2), (0.73, 0.5, 0.2)]
    turns = [2 * math.pi * k / count + 0.8 for k in range(count)]
    return [(0.5 + 0.27 * math.cos(a), 0.5 + 0.27 * math.sin(a), 0.14) for a in turns]


def unnamed_ink(background: str | None) -> str:
    """The first colour that stands off a ground; the first of all on a transparent one."""
    if background is None:
        return next(iter(COLORS))
    ground = oklab(np.array(rgb(background)))
    return next(w for w in COLORS if np.linalg.norm(oklab(np.array(rgb(w))) - ground) > STANDS_OFF)


def counterfactual(rule: str, scene: Scene, k: int) -> Scene:
    """The scene with one thing wrong: that of which the rule must not be satisfied.

    A count is off by one, upwards or downwards by the scene's number k. Colours give way to the most alike.
    """
    things = scene.things
    if rule == "background":
        return replace(scene, background=most_alike(scene.background or ""))
    if rule == "transparent":
        return replace(scene, background="white")
    if rule == "ink":
        return replace(scene, things=tuple((most_alike(ink or ""), shape) for ink, shape in things))
    if rule == "count":
        more = len(things) == 1 or k // 4 % 2 == 0
        return replace(scene, things=things[:1] * (len(things) + (1 if more else -1)))
    if rule == "relation":
        return replace(scene, relation=OPPOSITES[scene.relation or ""])
    if rule == "binding":
        (one, first), (other, second) = things
        return replace(scene, things=((other, first), (one, second)))
    raise ValueError(f"no counterfactual for the rule {rule!r}: add one")


def most_alike(color: str) -> str:
    """The other colour word nearest to one."""
    place = oklab(np.array(rgb(color)))
    return min(
        (word for word in COLORS if word != color),
        key=lambda word: float(np.linalg.norm(oklab(np.array(rgb(word))) - place)),
    )


def _paint(color: tuple[int, int, int], side: int, gradient: bool) -> Image.Image:
    """A square of paint: plain, or from a tint at its top to a shade at its bottom."""
    rows = np.tile(np.array(color, np.float64), (side, 1))
    if gradient:
        light = np.linspace(0.15, -0.2, side)[:, None]
        rows = np.where(light > 0, rows + (255 - rows) * light, rows * (1 + light))
    pixels = np.repeat(rows[:, None].round().astype(np.uint8), side, axis=1)
    return Image.fromarray(pixels, "RGB").convert("RGBA")
