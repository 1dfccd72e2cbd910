"""The rules of the scorecard on drawn pictures: right ones pass, each kind of wrong one fails."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusionfm.colors import COLORS, rgb
from diffusionfm.evaluate.drawn import draw_scene
from diffusionfm.evaluate.masks import color_words, drawn, oklab, pieces, shape_word
from diffusionfm.evaluate.rules import LINES, PAIRS, SAMPLES, Scene, verdicts
from diffusionfm.evaluate.statistics import frechet, share_of, wilson
from diffusionfm.outlines import OUTLINES

RED_STAR, BLUE_CIRCLE = ("red", "star"), ("blue", "circle")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("look", [{}, {"outline": True, "gradient": True}])
def test_pictures_right_by_construction_keep_every_rule(line, look):
    for k in range(0, SAMPLES, 7):
        prompt, scene = LINES[line].scene(k)
        assert all(verdicts(line, scene, draw_scene(scene, **look)).values()), prompt


@pytest.mark.parametrize("line", LINES)
def test_pictures_of_another_prompt_and_blank_ones_break_the_rules(line):
    right = 0
    for k in range(0, SAMPLES, 9):
        _, scene = LINES[line].scene(k)
        _, other = LINES[line].scene(k + 37)
        kept = verdicts(line, scene, draw_scene(other))
        right += kept[line]
        assert not any(verdicts(line, scene, Image.new("RGBA", (128, 128))).values())
        if line != "background":
            assert not any(verdicts(line, scene, Image.new("RGBA", (128, 128), "white")).values())
    assert right <= 2


def test_prompts_name_what_the_scene_holds_and_differ():
    for line in LINES.values():
        prompts = [line.scene(k) for k in range(SAMPLES)]
        assert all(scene.background is None or f"{scene.background} background" in p for p, scene in prompts)
        assert all(color is None or color in p for p, scene in prompts for color, _ in scene.things)
    for name in ("background", "binding"):
        assert len({LINES[name].scene(k)[0] for k in range(SAMPLES)}) == SAMPLES
    assert ("red", "blue") in PAIRS and ("red", "orange") not in PAIRS


# ------------------------------------------------------------------ each rule's own mistakes


def test_a_background_of_a_near_colour_a_hole_or_nothing_on_it_is_wrong():
    scene = Scene(((None, "cat"),), background="teal")
    right = draw_scene(scene)
    assert verdicts("background", scene, right) == {"background": True}
    wrong = [draw_scene(Scene(scene.things, background="green")), draw_scene(Scene(scene.things))]
    holed = right.copy()
    ImageDraw.Draw(holed).rectangle((0, 0, 127, 40), fill=(0, 0, 0, 0))
    wrong += [holed, Image.new("RGBA", (128, 128), rgb("teal") + (255,))]
    assert [verdicts("background", scene, picture)["background"] for picture in wrong] == [False] * 4


def test_ink_is_what_covers_most_and_transparency_is_the_border_s():
    scene = Scene((RED_STAR,))
    pink = draw_scene(Scene((("pink", "star"),)))
    assert verdicts("ink", scene, pink) == {"ink": False, "transparent": True}
    on_white = draw_scene(Scene((RED_STAR,), background="white"))
    assert verdicts("ink", scene, on_white) == {"ink": True, "transparent": False}
    spotted = draw_scene(scene)
    ImageDraw.Draw(spotted).ellipse((30, 30, 100, 100), fill="#1e88e5")
    assert not verdicts("ink", scene, spotted)["ink"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("background", [None, "sky blue"])
def test_counting_counts(number, background):
    picture = draw_scene(Scene(((None, "heart"),) * number, background=background))
    found = [verdicts("count", Scene(((None, "heart"),) * n), picture)["count"] for n in range(1, 5)]
    assert found == [n == number for n in range(1, 5)]


def test_specks_are_no_pieces_and_rings_are_whole():
    picture = draw_scene(Scene((RED_STAR, BLUE_CIRCLE)))
    brush = ImageDraw.Draw(picture)
    brush.point([(2, 2), (60, 5)], fill="black")
    brush.ellipse((88, 54, 104, 70), fill=(0, 0, 0, 0))  # a hole in the circle
    found = pieces(drawn(pixels(picture)))
    assert len(found) == 2 and {shape_word(piece) for piece in found} == {"star", "circle"}
    assert all(
        piece[int(np.argwhere(piece)[:, 0].mean()), int(np.argwhere(piece)[:, 1].mean())] for piece in found
    )


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_places(relation):
    picture = draw_scene(Scene((RED_STAR, BLUE_CIRCLE), relation=relation))
    for named in ("left of", "right of", "above", "below"):
        kept = verdicts("relation", Scene((RED_STAR, BLUE_CIRCLE), relation=named), picture)["relation"]
        assert kept == (named == relation)
    diagonal = Image.new("RGBA", (128, 128))
    diagonal.paste(draw_scene(Scene((RED_STAR,)), size=60), (0, 0))
    diagonal.paste(draw_scene(Scene((BLUE_CIRCLE,)), size=60), (62, 20))
    assert verdicts("relation", Scene((RED_STAR, BLUE_CIRCLE), relation="left of"), diagonal)["relation"]
    assert not verdicts("relation", Scene((RED_STAR, BLUE_CIRCLE), relation="above"), diagonal)["relation"]


def test_colours_swapped_between_shapes_are_wrong():
    scene = Scene((RED_STAR, BLUE_CIRCLE))
    swapped = Scene((("blue", "star"), ("red", "circle")))
    assert verdicts("binding", scene, draw_scene(scene))["binding"]
    assert not verdicts("binding", scene, draw_scene(swapped))["binding"]
    assert not verdicts("binding", scene, draw_scene(Scene((RED_STAR, ("red", "circle")))))["binding"]
    assert not verdicts("binding", scene, draw_scene(Scene((RED_STAR, ("blue", "square")))))["binding"]


def test_noise_keeps_no_rule():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    for line in LINES:
        for k in range(12):
            kept = verdicts(line, LINES[line].scene(k)[1], Image.fromarray(noise, "RGBA"))
            assert not any(kept[rule] for rule in kept if rule != "count")


# ------------------------------------------------------------------ the parts


def test_colour_words_bear_shade_and_tint():
    for word in COLORS:
        color = np.array(rgb(word), float)
        assert list(COLORS)[int(color_words(color))] == word
    for word in ("red", "green", "blue", "purple", "yellow", "orange"):
        color = np.array(rgb(word), float)
        for shade in (color * 0.9, color * 0.85 + 255 * 0.15):
            assert list(COLORS)[int(color_words(shade))] == word
    grey = oklab(np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128]]))
    assert np.allclose(grey[:, 0], [0, 1, 0.6], atol=0.01) and np.allclose(grey[:, 1:], 0, atol=1e-3)


@pytest.mark.parametrize("shape", OUTLINES)
def test_shapes_are_told_apart_and_a_bar_is_none(shape):
    for size in (40, 128):
        assert shape_word(pieces(drawn(pixels(draw_scene(Scene((("red", shape),)), size=size))))[0]) == shape
    bar = np.zeros((64, 64), bool)
    bar[30:34, 4:60] = True
    assert shape_word(bar) is None


def test_wilson_s_interval_and_the_share():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)  # Wilson 1927
    assert wilson(0, 200)[0] == 0 and 0.018 < wilson(0, 200)[1] < 0.019
    assert share_of(190, 200)["share"] == 0.95 and share_of(190, 200)["low"] < 0.92


def test_frechet_is_zero_for_equals_and_knows_shift_and_spread():
    a = np.random.default_rng(0).normal(size=(4000, 3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + [2, 0, 0]) == pytest.approx(4, abs=1e-6)
    assert frechet(a, a * 3) == pytest.approx(12, rel=0.05)  # 3 axes, (3 - 1) squared each
    for count in (5, 50):  # fewer pictures than features, and more: as its definition has it
        a, b = np.random.default_rng(count).normal(size=(2, count, 20)) * np.arange(1, 21) + 1
        b = b[1:] + 0.5
        both = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
        root = np.sqrt(np.linalg.eigvals(both).real.clip(min=0)).sum()
        spread = np.var(a, 0, ddof=1).sum() + np.var(b, 0, ddof=1).sum() - 2 * root
        assert frechet(a, b) == pytest.approx(np.square(a.mean(0) - b.mean(0)).sum() + spread, rel=1e-5)
