"""The list of words that flags prompts: what it sees through, what it leaves alone, what is done about it."""

from __future__ import annotations

import pytest

from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request
from diffusionfm.serve.safety import Safety


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude",
        "A NUDE man",
        "nüdé",
        "ｎｕｄｅ",
        "nu\u200bde",
        "nude-coloured",
        "a nude_man",
        "n\u0301ude",
        "nud3",
        "5ex",
        "slit\n  throat",
        "self-harm",
    ],
)
def test_a_listed_word_is_found_however_it_is_written(prompt):
    assert len(Safety().find(prompt)) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple",
        "a bottle from Essex",
        "a torturer's rack of spices",
        "a denuded tree",
        "",
        "7 seas, 40 ships",
    ],
)
def test_other_words_are_left_alone(prompt):
    assert Safety().find(prompt) == []


def test_flagged_pictures_are_drawn_and_say_so(tiny_pipe):
    with Engine(tiny_pipe) as engine:
        flagged = engine.submit(Request("a nude", steps=1)).result(60)
        plain = engine.submit(Request("a red apple", "nude", steps=1)).result(60)
    assert flagged.flagged == ["nude"] and len(flagged.images) == 1
    assert flagged.images[0].getextrema() != ((0, 0), (0, 0), (0, 0), (255, 255))
    assert plain.flagged == []


@pytest.mark.parametrize("mode", ["refuse", "off"])
def test_the_operator_chooses(tiny_pipe, mode):
    with Engine(tiny_pipe, safety=Safety(mode)) as engine:
        if mode == "off":
            assert engine.submit(Request("a nude", steps=1)).result(60).flagged == []
        else:
            with pytest.raises(ValueError, match="says 'nude'"):
                engine.submit(Request("a nude", steps=1))
            assert engine.counts.calls == 0


def test_a_list_of_one_s_own_takes_the_place_of_ours(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# ours\nBlue Fish\n")
    assert Safety(file=file).find("a blue, FISH") == ["blue fish"] and not Safety(file=file).find("a nude")
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no word"):
        Safety(file=file)
    with pytest.raises(ValueError, match="cannot be read"):
        Safety(file=tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="safety must be"):
        Safety("maybe")
