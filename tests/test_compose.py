"""Compositions: what is drawn is what the caption says, by the scorecard's own rules; reserved pairs stay out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionfm.data.icons import load_corpus_config
from diffusionfm.data.icons.compose import NUMBERS, ComposeConfig, Composer, countable, read_reserved
from diffusionfm.evaluate.rules import (
    LINES,
    Scene,
    has_background,
    has_binding,
    has_count,
    has_ink,
    has_relation,
)
from diffusionfm.phrasing import plural

ROOT = Path(__file__).resolve().parents[1]
RESERVED = ROOT / "configs/data/reserved.txt"


def compose(count: int, kind: str, reserved: str | None = None):
    config = ComposeConfig(count=count, sources=["toys"], common=1, reserved=reserved, kinds={kind: 1.0})
    composer = Composer(config, size=128, seed=3)
    apple = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    apple.paste((200, 30, 30, 255), (20, 30, 110, 100))
    told = {"package": "p", "version": "1", "licence": "MIT", "attribution": "someone", "ink": None}
    composer.offer(apple, {"source": "toys", "phrase": "apple", "split": "train", **told})
    composer.offer(apple, {"source": "toys", "phrase": "secret", "split": "heldout", **told})
    return list(composer.samples())


LEFT, RIGHT = ("left of", "to the left of"), ("right of", "to the right of")
ABOVE, BELOW = ("above", "over"), ("below", "under")
SAID = {"left of": (LEFT, RIGHT), "right of": (RIGHT, LEFT), "above": (ABOVE, BELOW), "below": (BELOW, ABOVE)}


def things(*named: str) -> tuple[tuple[str, str], ...]:
    return tuple((color, shape) for color, _, shape in (name.partition(" ") for name in named))


def test_as_many_as_the_caption_says():
    seen = set()
    for _, picture, caption, meta in compose(40, "count"):
        word = caption.split()[0]
        number = NUMBERS.index(word) + 1 if word in NUMBERS else 1
        seen.add(number)
        if number > 1:
            assert meta["captions"][1].startswith(f"{number} {caption.split(' ', 1)[1]}")
        if meta["background"] is None:
            assert has_count(np.asarray(picture), Scene(((None, "thing"),) * number)), caption
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("words", ["left of", "right of", "above", "below"])
def test_where_the_caption_says(words):
    judged = 0
    for _, picture, caption, meta in compose(60, "relation"):
        first, found, second = caption.partition(f" {words} ")
        pair = things(first.split(" ", 1)[1], second.split(" ", 1)[-1]) if found else ()
        if meta["background"] or len(pair) < 2 or "apple" in caption or len({color for color, _ in pair}) < 2:
            continue
        judged += 1
        assert has_relation(np.asarray(picture), Scene(pair, relation=words)), caption
        here, back = SAID[words]  # and the same picture from the other side
        told = [f"{first} {way} {second}" for way in here] + [f"{second} {way} {first}" for way in back]
        assert meta["captions"] == told
    assert judged >= 3


def test_a_shape_alone_is_in_the_colour_named():
    judged = 0
    for _, picture, caption, meta in compose(40, "shape"):
        told = things(caption.split(" on a")[0].split(" ", 1)[1])
        if meta["background"] is None and told[0][1]:
            judged += 1
            assert has_ink(np.asarray(picture), Scene(told)), caption
    assert judged >= 10


def test_each_colour_on_its_own_shape():
    judged = 0
    for _, picture, caption, meta in compose(60, "pair"):
        pair = (
            things(*(part.split(" ", 1)[1] for part in caption.split(" and ")))
            if "apple" not in caption
            else ()
        )
        if meta["background"] or len(pair) < 2 or len({color for color, _ in pair}) < 2:
            continue
        judged += 1
        assert has_binding(np.asarray(picture), Scene(pair)), caption
    assert judged >= 10


def test_a_thing_on_its_ground_and_never_a_held_out_one():
    for key, picture, caption, meta in compose(20, "ground"):
        assert caption.startswith("an apple on a") and has_background(
            np.asarray(picture), Scene(((None, "apple"),), background=meta["background"])
        )
        assert meta["licence"] == "MIT" and meta["attribution"] == "someone" and meta["source"] == "composed"
        assert len(key) == 17


def test_the_scorecards_pairs_are_reserved_and_never_drawn():
    reserved = read_reserved(RESERVED)
    asked = {
        frozenset(" ".join(thing) for thing in LINES[line].scene(k)[1].things)
        for line in ("relation", "binding")
        for k in range(200)
    }
    assert asked == reserved
    for kind in ("relation", "pair"):
        for _, _, caption, _ in compose(150, kind, reserved=str(RESERVED)):
            plain = caption.replace(" an ", " a ")
            for pair in reserved:
                assert not all(f"a {words}" in plain or f"an {words}" in plain for words in pair), caption


def test_the_same_again():
    first, again = (compose(5, "count") for _ in range(2))
    assert [(k, p.tobytes(), c) for k, p, c, _ in first] == [(k, p.tobytes(), c) for k, p, c, _ in again]


def test_the_corpus_names_real_sources_and_kinds():
    config = load_corpus_config(ROOT / "configs/data/icons.yaml")
    assert config.compositions is not None and set(config.compositions.sources) <= set(config.sources)
    with pytest.raises(ValueError, match="kinds: unknown heap"):
        Composer(ComposeConfig(1, ["toys"], kinds={"heap": 1.0}), 128, 0)
    with pytest.raises(ValueError, match="common enough"):
        list(Composer(ComposeConfig(1, ["toys"]), 128, 0).samples())


def test_a_reserved_file_that_cannot_be_read_names_its_line(tmp_path):
    file = tmp_path / "reserved.txt"
    file.write_text("# a remark\nred star, blue circle\nred star\n")
    with pytest.raises(ValueError, match=r"reserved\.txt, line 3"):
        read_reserved(file)


@pytest.mark.parametrize(
    ("one", "many"),
    [("star", "stars"), ("red box", "red boxes"), ("cherry", "cherries"), ("key", "keys"), ("mouse", "mice"),
     ("paint brush", "paint brushes"), ("glass", "glasses")],
)  # fmt: skip
def test_plurals(one, many):
    assert plural(one) == many


@pytest.mark.parametrize(
    "phrase", ["flag of france", "glasses", "rice", "face with tears", "x", "1st place medal"]
)
def test_what_cannot_be_counted(phrase):
    assert not countable(phrase)
