"""Prompts whose truth pixels decide, in GenEval's categories (arXiv:2310.11513): no network judges them.

Each line has prompts that name colours, shapes, numbers and places, and a rule that a picture keeps or breaks.
The shipped corpus has compositions of all of these; the pairs of coloured shapes asked for here are kept out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from diffusionfm.colors import INKS
from diffusionfm.evaluate.masks import WORDS, color_words, colored, drawn, pieces, ring, shape_word
from diffusionfm.outlines import OUTLINES
from diffusionfm.phrasing import article, on_background

SAMPLES = 200  # of each line
UNIFORM = 0.9  # of the border that must agree
MOST = 0.4  # of what is drawn that must have the ink's colour
SEEN = 0.01  # of the picture that a thing must cover to be there
APART = 0.1  # of the picture's side between two centres

THINGS = (
    "cat", "dog", "star", "heart", "house", "tree", "car", "apple", "fish", "flower", "rocket", "guitar",
    "crown", "umbrella", "ghost", "robot", "key", "bell", "book", "cup",
)  # fmt: skip
ALIKE = ({"red", "orange"}, {"red", "pink"}, {"orange", "yellow"}, {"purple", "pink"}, {"blue", "purple"})
PAIRED = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
PAIRS = tuple(pair for pair in permutations(PAIRED, 2) if {*pair} not in ALIKE)
COUNTED = {"star": "stars", "heart": "hearts", "circle": "circles", "square": "squares", "apple": "apples"}
NUMBERS = ("one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: (colour or None, thing) each, the ground, and where the first is from the second."""

    things: tuple[tuple[str | None, str], ...]
    background: str | None = None
    relation: str | None = None


# ------------------------------------------------------------------ prompts


def background_scene(k: int) -> tuple[str, Scene]:
    thing, color = THINGS[k % len(THINGS)], WORDS[k % len(WORDS)]
    return f"{article(thing)}{on_background(color)}", Scene(((None, thing),), background=color)


def ink_scene(k: int) -> tuple[str, Scene]:
    ink, shape = INKS[k % len(INKS)], tuple(OUTLINES)[k % len(OUTLINES)]
    return article(f"{ink} {shape}"), Scene(((ink, shape),))


def count_scene(k: int) -> tuple[str, Scene]:
    number, thing = k % 4, tuple(COUNTED)[k // 4 % len(COUNTED)]
    words = f"{NUMBERS[number]} {COUNTED[thing]}" if number else article(thing)
    return words, Scene(((None, thing),) * (number + 1))


def relation_scene(k: int) -> tuple[str, Scene]:
    first, second = _pair(k // 4)
    relation = tuple(RELATIONS)[k % 4]
    words = f"{article(' '.join(first))} {relation} {article(' '.join(second))}"
    return words, Scene((first, second), relation=relation)


def binding_scene(k: int) -> tuple[str, Scene]:
    first, second = _pair(k)
    return f"{article(' '.join(first))} and {article(' '.join(second))}", Scene((first, second))


def _pair(k: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two coloured shapes, alike in neither."""
    shapes = tuple(permutations(OUTLINES, 2))[(k + k // len(PAIRS)) % 20]
    colors = PAIRS[k % len(PAIRS)]
    return (colors[0], shapes[0]), (colors[1], shapes[1])


# ------------------------------------------------------------------ rules


def has_background(pixels: np.ndarray, scene: Scene) -> bool:
    """The border is opaque and of the named colour, and something else is drawn on it."""
    border = pixels[ring(pixels.shape[:2])]
    right = (border[:, 3] > 229) & (color_words(border[:, :3]) == WORDS.index(scene.background or ""))
    return bool(right.mean() >= UNIFORM) and bool(drawn(pixels).mean() >= SEEN)


def is_transparent(pixels: np.ndarray, scene: Scene) -> bool:
    """Nothing lies on the border, and something is drawn inside."""
    border = pixels[ring(pixels.shape[:2])]
    return bool((border[:, 3] < 26).mean() >= UNIFORM) and bool((pixels[..., 3] > 127).mean() >= SEEN)


def has_ink(pixels: np.ndarray, scene: Scene) -> bool:
    """Of what is drawn the named colour covers most: more than any other, and MOST of it."""
    mask = drawn(pixels)
    if mask.mean() < SEEN:
        return False
    counts = np.bincount(color_words(pixels[..., :3])[mask], minlength=len(WORDS))
    ink = WORDS.index(scene.things[0][0] or "")
    return bool(counts.argmax() == ink and counts[ink] >= MOST * mask.sum())


def has_count(pixels: np.ndarray, scene: Scene) -> bool:
    """There are as many separate pieces as things."""
    return len(pieces(drawn(pixels))) == len(scene.things)


def has_relation(pixels: np.ndarray, scene: Scene) -> bool:
    """Both colours are there, and the first lies from the second as named, more so than any other way."""
    centres = []
    for color, _ in scene.things:
        piece = largest(pixels, color or "")
        if piece is None:
            return False
        rows, columns = np.nonzero(piece)
        centres.append((columns.mean() / piece.shape[1], rows.mean() / piece.shape[0]))
    away = np.subtract(centres[0], centres[1])
    along = np.array(RELATIONS[scene.relation or ""])
    step = float(away @ along)
    return step >= APART and step >= abs(float(away @ along[::-1]))


def has_binding(pixels: np.ndarray, scene: Scene) -> bool:
    """Each colour's largest piece has the shape that was named with it."""
    for color, shape in scene.things:
        piece = largest(pixels, color or "")
        if piece is None or shape_word(piece) != shape:
            return False
    return True


def largest(pixels: np.ndarray, color: str) -> np.ndarray | None:
    """The largest piece of a colour; None where it covers less than SEEN."""
    found = pieces(colored(pixels, color))
    return found[0] if found and found[0].mean() >= SEEN else None


@dataclass(frozen=True)
class Line:
    """Prompts of one kind, and the rules that their pictures are held to."""

    scene: Callable[[int], tuple[str, Scene]]
    rules: dict[str, Callable[[np.ndarray, Scene], bool]]


LINES = {
    "background": Line(background_scene, {"background": has_background}),
    "ink": Line(ink_scene, {"ink": has_ink, "transparent": is_transparent}),
    "count": Line(count_scene, {"count": has_count}),
    "relation": Line(relation_scene, {"relation": has_relation}),
    "binding": Line(binding_scene, {"binding": has_binding}),
}
RULES = {
    "background": "the background has the colour named",
    "transparent": "transparent where no background is named",
    "ink": "what is drawn has the colour named (shape not judged)",
    "count": "as many pieces as things named, one to four, whatever they are",
    "relation": "the two colours lie as named: left, right, above, below (shapes not judged)",
    "binding": "two colours on the two shapes named with them",
}
"""Rule -> what a picture that keeps it shows."""


def verdicts(line: str, scene: Scene, picture: Image.Image) -> dict[str, bool]:
    """Rule -> whether a picture keeps it."""
    pixels = np.asarray(picture.convert("RGBA"))
    return {name: rule(pixels, scene) for name, rule in LINES[line].rules.items()}
