"""Words that a model never learned: found in a prompt, told with near ones, shipped with the model."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from diffusionfm.batch import plan_batch
from diffusionfm.checks import SHIPPED
from diffusionfm.drawing import Task
from diffusionfm.phrasing import words_in
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request
from diffusionfm.vocabulary import FILE, Vocabulary, learned_words
from tests.batch_toys import make

WORDS = "apple ale ape red cat cherry space ship joy smiling on".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def knowing(tiny_model, tmp_path_factory):
    """The tiny pipeline with a list of words in its folder."""
    folder = tmp_path_factory.mktemp("model") / "knowing"
    shutil.copytree(tiny_model, folder)
    (folder / FILE).write_text("\n".join([*WORDS, "café"]) + "\n", encoding="utf-8")
    return DiffusionFMPipeline.from_pretrained(folder)


def test_a_batch_tells_of_words_that_are_of_no_use(knowing, tmp_path):
    rows = [{"id": f"r{k}", "prompt": f"a red apple and a {'zyxw'[k % 4] * 4}"} for k in range(8)]
    rows += [
        {"id": "long", "prompt": "red apple " * 30},
        {"id": "no", "prompt": "cat", "negative_prompt": "lynx"},
    ]
    rows += [{"id": "good", "prompt": "a red cat"}, {"id": "bad", "prompt": "quokka", "steps": 0}]
    plan = plan_batch(rows, knowing, tmp_path, repeats=2)
    said = [
        "18 pictures have words that the model never learned, such as: zzzz, yyyy, xxxx, wwww, lynx",
        "2 pictures have longer prompts than the model reads, such as: long",
    ]
    assert plan.text().splitlines()[-3:-1] == said
    for _ in range(2):  # and once more with every picture there
        summary = make(rows, knowing, tmp_path, repeats=2, steps=1, guidance=1.0)
        assert summary.text().splitlines()[-2:] == said
        report = json.loads((tmp_path / "report.json").read_text())
        told = {"unknown": 18, "words": ["zzzz", "yyyy", "xxxx", "wwww", "lynx"], "cut": 2, "rows": ["long"]}
        assert report["advice"] == plan.report()["advice"] == told
    assert make(["a cat"], knowing, tmp_path / "other").text().count("never learned") == 0


def test_words_are_read_as_captions_have_them():
    assert words_in("A red Apple’s leaf, 3D & co-pilot 8k naïve") == [
        "a",
        "red",
        "apple's",
        "leaf",
        "d",
        "co",
        "pilot",
        "k",
        "naïve",
    ]


def test_forms_small_words_and_numbers_are_no_news():
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.unknown("please draw the red cats, 3 cherries and an apple's 7 ships") == []
    assert vocabulary.unknown("a zebra, a Zebra and a lynx") == ["zebra", "lynx"]
    assert vocabulary.unknown("a red apple on a cat") == []


@pytest.mark.parametrize(
    "word, near",
    [
        ("aple", ("apple", "ale", "ape")),
        ("spaceship", ("space", "ship")),
        ("joyful", ("joy",)),
        ("smilling", ("smiling",)),
        ("quokka", ()),
    ],
)
def test_near_words_are_parts_and_spellings(word, near):
    assert Vocabulary(WORDS).near(word) == near


def test_learned_words_are_those_of_several_pictures():
    captions = [["a cat", "cat cat"], ["a black cat"], ["a dog"], ["a Dog"], ["one cat"]]
    assert learned_words(captions, least=2) == ["a", "cat", "dog"]


def test_a_drawing_warns_of_words_never_learned(knowing):
    warnings = knowing("a red zebra, an aple", "lynx", num_inference_steps=1).warnings
    assert warnings == [
        "the model never learned the word 'zebra'",
        "the model never learned the word 'aple'; near ones: apple, ale, ape",
        "the model never learned the word 'lynx'",
    ]
    with Engine(knowing) as engine:
        (warning,) = engine.submit(Request("a red zebra", num_images=2, steps=1)).result(60).warnings
    assert "'zebra'" in warning


def test_with_a_lora_no_word_is_called_unknown(knowing):
    assert knowing.advice([Task("a zebra", "", 0)], loras=["mine"]) == []


def test_what_the_encoder_does_not_read_is_only_called_left_out(knowing):
    (warning,) = knowing.advice([Task("red apple " * 30 + "zebra", "", 0)])
    assert "left out" in warning and "zebra" in warning


def test_a_model_without_a_list_says_nothing_of_words(tiny_pipe):
    assert tiny_pipe.vocabulary is None and tiny_pipe.advice([Task("a zebra", "", 0)]) == []


def test_the_list_is_saved_with_the_pipeline(knowing, tmp_path):
    knowing.save_pretrained(tmp_path / "copy")
    assert DiffusionFMPipeline.from_pretrained(tmp_path / "copy").vocabulary.words == [*WORDS, "café"]
    (tmp_path / "copy" / FILE).write_text("x" * (2**20 + 1))
    with pytest.raises(ValueError, match="over 1 MiB"):
        DiffusionFMPipeline.from_pretrained(tmp_path / "copy")


def test_advice_may_be_asked_for_while_others_draw(knowing):
    errors = []

    def ask() -> None:
        try:
            for _ in range(50):
                knowing.advice([Task("red apple " * 30, "", 0)])
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        knowing("a red apple", num_inference_steps=1, height=32, width=32)
    assert errors == []


def test_the_shipped_model_lists_its_words_in_little_room():
    file = SHIPPED / FILE
    vocabulary = Vocabulary.read(file)
    assert vocabulary is not None and file.stat().st_size < 61_440
    assert vocabulary.unknown("a flat emoji of a smiling cat on a sky blue background") == []
    assert vocabulary.near("elefant")[0] == "elephant"
