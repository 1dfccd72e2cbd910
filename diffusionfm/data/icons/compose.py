"""Compositions: several things, or one on a coloured ground, arranged by rule so that the caption is exact.

Drawn icons show one thing; counting, places and which colour belongs to which thing must be shown to be learned.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffusionfm.colors import COLORS, INKS, rgb
from diffusionfm.data.icons.captions import pick_background
from diffusionfm.data.icons.render import clear_hidden, edge_color, inked, on_color
from diffusionfm.outlines import OUTLINES
from diffusionfm.phrasing import NUMBERS, article, on_background, plural

SOURCE = "composed"
RELATIONS = {  # words, the words seen from the other thing, direction of the first from the second
    "left of": (("left of", "to the left of"), ("right of", "to the right of"), (-1, 0)),
    "right of": (("right of", "to the right of"), ("left of", "to the left of"), (1, 0)),
    "above": (("above", "over"), ("below", "under"), (0, -1)),
    "below": (("below", "under"), ("above", "over"), (0, 1)),
}
# Arrangements of n things: centres in [0, 1], and the largest size that keeps them apart.
PLACES: dict[int, list[tuple[list[tuple[float, float]], float]]] = {
    1: [([(0.5, 0.5)], 0.8)],
    2: [([(0.26, 0.5), (0.74, 0.5)], 0.42), ([(0.5, 0.26), (0.5, 0.74)], 0.42), ([(0.29, 0.29), (0.71, 0.71)], 0.4)],
    3: [
        ([(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)], 0.28),
        ([(0.5, 0.27), (0.26, 0.73), (0.74, 0.73)], 0.4),
        ([(0.26, 0.27), (0.74, 0.27), (0.5, 0.73)], 0.4),
    ],
    4: [([(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)], 0.4)],
}  # fmt: skip
JITTER = 0.02  # of the side, by which each centre and size may differ


@dataclass
class ComposeConfig:
    """The `compositions` of `configs/data/icons.yaml`.

    count: pictures to make. sources: whose drawings are used. common: at least so many of them draw a thing.
    reserved: file of pairs of coloured shapes that are never shown together, a pair a line: they judge the model.
    kinds: how often each kind comes.
    """

    count: int
    sources: list[str]
    common: int = 3
    reserved: str | None = None
    kinds: dict[str, float] = field(
        default_factory=lambda: {"ground": 0.2, "count": 0.2, "relation": 0.25, "pair": 0.25, "shape": 0.1}
    )


@dataclass(frozen=True)
class Thing:
    """A picture to arrange, cut to what is drawn, and its words without an article."""

    words: str
    picture: Image.Image
    meta: dict[str, Any]


class Composer:
    """Makes the k-th composition from drawings that were `offer`ed; the same drawings give the same pictures."""

    def __init__(self, config: ComposeConfig, size: int, seed: int):
        if unknown := set(config.kinds) - {"ground", "count", "relation", "pair", "shape"}:
            raise ValueError(f"compositions.kinds: unknown {', '.join(sorted(unknown))}")
        self.config, self.size, self.seed = config, size, seed
        self.reserved = read_reserved(config.reserved) if config.reserved else set()
        self.offered: dict[str, dict[str, list[Thing]]] = defaultdict(lambda: defaultdict(list))

    def offer(self, picture: Image.Image, meta: dict[str, Any]) -> None:
        """Keep a training drawing for arranging, if its source and words suit."""
        phrase = meta["phrase"]
        if meta["source"] in self.config.sources and meta["split"] == "train" and countable(phrase):
            told = {key: meta[key] for key in ("source", "package", "version", "licence", "attribution")}
            self.offered[phrase][meta["source"]].append(
                Thing(phrase, cut(picture), told | {"ink": meta["ink"]})
            )

    def samples(self) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
        """(key, RGBA picture, caption, metadata) of every composition."""
        by_source: dict[str, list[list[Thing]]] = defaultdict(list)
        for _, drawn in sorted(self.offered.items()):
            if len(drawn) >= self.config.common:
                for source, things in sorted(drawn.items()):
                    by_source[source].append(things)
        if not by_source:
            raise ValueError("compositions: none of its sources draws anything that is common enough")
        kinds, shares = zip(*sorted(self.config.kinds.items()), strict=True)
        shares = np.array(shares) / sum(shares)
        for k in range(self.config.count):
            rng = np.random.default_rng([self.seed, 0xC0, k])
            kind = str(rng.choice(kinds, p=shares))
            source = str(rng.choice(sorted(by_source)))
            yield self._sample(k, kind, by_source[source], rng)

    def _sample(
        self, k: int, kind: str, drawn: list[list[Thing]], rng: np.random.Generator
    ) -> tuple[str, Image.Image, str, dict[str, Any]]:
        things, places, captions = getattr(self, f"_{kind}")(drawn, rng)
        picture = arrange([thing.picture for thing in things], places, self.size)
        background = None
        if kind == "ground" or rng.random() < 0.25:
            background = pick_background(edge_color(picture), rng)
            picture = on_color(picture, background)
            captions = [caption + on_background(background) for caption in captions]
        digest = hashlib.sha256(f"{SOURCE}/{k}".encode()).hexdigest()
        parts = {part.meta["attribution"]: part.meta for part in things}
        first = next(iter(parts.values()))
        meta = {
            **{key: first[key] for key in ("package", "version", "licence")},
            "source": SOURCE,
            "attribution": "; ".join(parts),
            "name": f"{kind} {k}",
            "phrase": captions[0],
            "keywords": [],
            "style": "",
            "palette": "color",
            "background": background,
            "background_hex": COLORS[background] if background else None,
            "ink": None,
            "ink_hex": None,
            "split": "train",
            "captions": list(dict.fromkeys(captions)),
        }
        return digest[:16] + "a", picture, captions[0], meta

    # -------------------------------------------------------------- kinds: (things, places, captions)

    def _ground(self, drawn, rng):
        thing = self._drawn(drawn, rng)
        words = article(thing.words)
        return [thing], [(0.5, 0.5, float(rng.uniform(0.72, 0.88)))], [words, thing.words]

    def _shape(self, drawn, rng):
        thing = self._colored(rng)
        return [thing], [(0.5, 0.5, float(rng.uniform(0.5, 0.88)))], [article(thing.words), thing.words]

    def _count(self, drawn, rng):
        number = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.3, 0.3, 0.3]))
        plain = rng.random() < 0.3  # a shape whose colour is not named
        shape = rng.random() < 0.5
        thing = self._colored(rng, named=not plain) if shape else self._drawn(drawn, rng)
        if number == 1:
            words = [article(thing.words), f"one {thing.words}"]
        else:
            many = plural(thing.words)
            words = [f"{NUMBERS[number - 1]} {many}", f"{number} {many}"]
        return [thing] * number, placed(number, rng), words

    def _relation(self, drawn, rng):
        first, second = self._two(drawn, rng)
        name = str(rng.choice(sorted(RELATIONS)))
        here, there, (x, y) = RELATIONS[name]
        a, b = article(first.words), article(second.words)
        captions = [f"{a} {words} {b}" for words in here] + [f"{b} {words} {a}" for words in there]
        far, side = rng.uniform(0.22, 0.25), rng.uniform(-0.06, 0.06)
        size = rng.uniform(0.34, 0.42, 2)
        places = [
            (
                0.5 + sign * (x * far) + (y != 0) * side * sign,
                0.5 + sign * (y * far) + (x != 0) * side * sign,
                float(s),
            )
            for sign, s in zip((1, -1), size, strict=True)
        ]
        return [first, second], places, captions

    def _pair(self, drawn, rng):
        first, second = self._two(drawn, rng)  # side by side as they are read: one picture for one caption
        x, y, size = rng.uniform((0.25, 0.47, 0.4), (0.27, 0.53, 0.46))
        places = [(x, y, size), (1 - x, y, size)]
        return [first, second], places, [f"{article(first.words)} and {article(second.words)}"]

    # -------------------------------------------------------------- things

    def _two(self, drawn, rng) -> tuple[Thing, Thing]:
        """Two coloured shapes, or two drawn things; no reserved pair, and never the same words."""
        while True:
            pick = self._colored if rng.random() < 0.7 else lambda r: self._drawn(drawn, r)
            first, second = pick(rng), pick(rng)
            pair = frozenset((first.words, second.words))
            if len(pair) == 2 and pair not in self.reserved and not alike(first.words, second.words):
                return first, second

    def _drawn(self, drawn: list[list[Thing]], rng: np.random.Generator) -> Thing:
        things = drawn[rng.integers(len(drawn))]
        thing = things[rng.integers(len(things))]
        if thing.meta["ink"] is None:
            return thing
        ink = str(rng.choice(INKS))  # one-colour drawings take any ink
        return Thing(f"{ink} {thing.words}", inked(thing.picture, ink), thing.meta)

    def _colored(self, rng: np.random.Generator, named: bool = True) -> Thing:
        color, shape = str(rng.choice(INKS)), str(rng.choice(sorted(OUTLINES)))
        meta = {
            "source": SOURCE,
            "package": "diffusionfm",
            "version": "1",
            "licence": "CC0-1.0",
            "attribution": "plain shapes, drawn by DiffusionFM",
        }
        return Thing(f"{color} {shape}" if named else shape, flat_shape(shape, color, self.size), meta)


def read_reserved(path: str | Path) -> set[frozenset[str]]:
    """The reserved pairs of a file: "red circle, blue star" a line, # for remarks; ValueError for any other line."""
    pairs = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            pair = frozenset(words.strip() for words in line.split(","))
            if len(pair) != 2:
                raise ValueError(
                    f"{path}, line {number}: expected two things with a comma between, not {line!r}"
                )
            pairs.add(pair)
    return pairs


def countable(phrase: str) -> bool:
    """Whether a phrase names one thing of one or two words that takes an article and a plural."""
    words = phrase.split()
    return (
        len(words) <= 2
        and phrase.replace(" ", "").isalpha()
        and article(phrase) != phrase
        and len(phrase) > 2
    )


def alike(a: str, b: str) -> bool:
    """Whether two names share a word that tells a thing, not a colour: "red star", "blue star"."""
    return bool(set(a.split()) & set(b.split()) - set(COLORS))


def placed(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(centre x, centre y, size) of `count` equal things, all in parts of the side."""
    centres, largest = PLACES[count][rng.integers(len(PLACES[count]))]
    size = float(rng.uniform(0.78, 1.0)) * largest
    free = JITTER + (largest - size) / 2
    shift = rng.uniform(-free, free, (count, 2)) if count > 1 else np.zeros((1, 2))
    return [(x + float(dx), y + float(dy), size) for (x, y), (dx, dy) in zip(centres, shift, strict=True)]


def cut(picture: Image.Image) -> Image.Image:
    """An RGBA picture cut to what is drawn."""
    return picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())


def flat_shape(shape: str, color: str, size: int) -> Image.Image:
    """A plain shape of one colour, RGBA, `size` pixels a side, edges smoothed."""
    big = Image.new("L", (4 * size, 4 * size))
    half = 2 * size
    ImageDraw.Draw(big).polygon([(half + half * x, half + half * y) for x, y in OUTLINES[shape]], fill=255)
    picture = Image.new("RGBA", (size, size), (*rgb(color), 255))
    picture.putalpha(big.resize((size, size), Image.Resampling.BOX))
    return cut(clear_hidden(picture))


def arrange(
    pictures: Sequence[Image.Image], places: Sequence[tuple[float, float, float]], size: int
) -> Image.Image:
    """Pictures laid on a transparent square, each fitted to a box about its centre."""
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    for picture, (x, y, side) in zip(pictures, places, strict=True):
        scale = side * size / max(picture.size)
        width, height = (max(1, round(s * scale)) for s in picture.size)
        small = picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
        left = min(max(round(x * size - width / 2), 1), size - width - 1)
        top = min(max(round(y * size - height / 2), 1), size - height - 1)
        square.alpha_composite(small, (left, top))
    return clear_hidden(square)
