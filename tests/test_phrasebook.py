"""Prompts in words that a model does not know: read as the nearest phrase it does, and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Running

from diffusionfm.batch.draw import draw_remotely
from diffusionfm.batch.options import Options
from diffusionfm.checks import SHIPPED
from diffusionfm.cli import main
from diffusionfm.data.shards import ShardWriter
from diffusionfm.drawing import Task
from diffusionfm.evaluate.assets import FOLDER, load_assets
from diffusionfm.finetune.export import merge
from diffusionfm.images import read_parameters
from diffusionfm.phrasebook import FILES, Phrasebook
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request
from diffusionfm.serve.safety import Safety
from diffusionfm.vocabulary import Vocabulary, well_known
from tests.batch_toys import make, records_of

COMMON = ["smiling", "instrument", "animal"]
TOLD = {
    "dog": ["a dog", "dog", "a sticker of a dog", "dog, pet, animal, puppy", "a domesticated canine"],
    "ghost": ["a ghost", "a spirit that haunts"],
    "running shoe": ["an athletic shoe"],
    "pizza": [], "guitar": [], "elephant": [], "fire engine": [], "snowflake": [], "cup of coffee": [], "crown": [],
    "tree": [], "umbrella": [], "train": [], "castle": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def book() -> Phrasebook:
    return Phrasebook.of(
        {phrase: (3, captions) for phrase, captions in TOLD.items()},
        common=COMMON,
    )


@pytest.fixture
def reading(tiny_model, book, tmp_path):
    """The tiny pipeline with a phrasebook in its folder."""
    folder = shutil.copytree(tiny_model, tmp_path / "reading")
    for name, data in book.files().items():
        (folder / name).write_bytes(data)
    return DiffusionFMPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a puppy", "a dog"),
        (
            "two red puppies and a phantom on a blue background",
            "two red dogs and a ghost on a blue background",
        ),
        ("a flat emoji of a puppy", "a flat emoji of a dog"),
        ("A puppy to the left of a locomotive", "a dog to the left of a train"),
        ("a locomotive for pulling wagons on rails", "a train"),
        ("a pizzza", "a pizza"),
        ("a red  gitar", "a red guitar"),
        ('"a  puppy"', "a puppy"),
        ("“a puppy”", "a puppy"),
        ("a puppy on a crimson background.", "a dog on a crimson background"),
        ("a puppy above a locomotive for pulling wagons on rails", "a dog above a train"),
        ("a tiny red puppy", "a red dog"),
        ("an instrument that guitars are", "a guitar"),
        ("an animal that’s a dog and a smiling ghost", "a dog and a smiling ghost"),
        ("a spirit with a sheet and a scary face that haunts", "a ghost"),
    ],
)
def test_things_in_strange_words_become_the_nearest_phrase(book, prompt, read):
    assert book.read_as(prompt) == read


@pytest.mark.parametrize(
    "prompt",
    [
        "three dogs on a navy  background",
        "a smiling ghost above a purple tree",
        "a flag of zanzibar",
        "xqzt blorf",
        "2 puppies",
        "five puppies",
        "a dozen red puppies",
        "犬",
        '" "',
        '"a puppy" and a "ghost"',
        " and ".join(["a puppy"] * 9),
        "could you draw two red dogs",
        "what a red crown",
        "a dog that is blue and a ghost that is green",
        "three dogs that are red and green",
        "an animal-that-you pizza tree",
        "Ein roter Apfel",
        "",
        '"',
    ],
)
def test_what_is_known_or_near_nothing_stays_as_it_is(book, prompt):
    assert book.read_as(prompt) == prompt


def test_a_book_that_tells_nothing_apart_is_refused():
    with pytest.raises(ValueError, match="mean different things"):
        Phrasebook.of({"dog": (3, [])})


def test_of_two_near_phrases_the_one_that_many_draw():
    told = {phrase: (3, captions) for phrase, captions in TOLD.items()} | {"poodle": (3, [])}
    once = Phrasebook.of(told)
    assert once.nearest("fluffy poodle") == "poodle"
    once.sources[once.phrases.index("dog")] = 200
    assert once.nearest("fluffy poodle") == "dog" and once.nearest("xqzt blorf") is None


def test_it_is_the_same_from_its_files_and_bad_files_are_told(book, tmp_path):
    assert Phrasebook.read(tmp_path) is None
    for name, data in book.files().items():
        (tmp_path / name).write_bytes(data)
    again = Phrasebook.read(tmp_path, COMMON)
    assert again is not None and again.phrases == book.phrases and again.words == book.words
    assert np.array_equal(again.signs, book.signs) and again.read_as("a puppy") == "a dog"
    text, numbers = (tmp_path / name for name in FILES)
    turned = "\n".join([*reversed(book.phrases), ""]).encode()
    for file, data in (
        (text, b"dog\n"),
        (text, turned),
        (numbers, b"x" * 100),
        (numbers, b"x" * (2**20 + 1)),
    ):
        kept = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(ValueError, match="does not fit|over 1 MiB") as caught:
            Phrasebook.read(tmp_path)
        assert "\n" not in str(caught.value)
        file.write_bytes(kept)


def test_a_drawing_is_that_of_the_phrase_and_tells_so(reading):
    given = {"seed": 3, "num_inference_steps": 2}
    drawn, meant = reading("a puppy", **given), reading("a dog", **given)
    assert drawn.images[0].tobytes() == meant.images[0].tobytes()
    assert drawn.images[0].tobytes() != reading('"a puppy"', **given).images[0].tobytes()
    assert drawn.told[0]["prompt"] == "a puppy" and drawn.told[0]["read_as"] == "a dog"
    assert "read_as" not in meant.told[0]
    (said,) = drawn.warnings
    assert said.startswith('drawn as "a dog"') and meant.warnings == []
    assert reading('"a  puppy"', **given).warnings == []
    with Engine(reading) as engine:
        there = engine.submit(Request("a puppy", seed=3, steps=2)).result(60)
    difference = np.abs(np.asarray(there.images[0], int) - np.asarray(meant.images[0], int)).max()
    assert difference <= 1 and there.told == drawn.told and there.warnings == [said]


def test_what_is_drawn_in_the_place_of_a_prompt_is_checked_too(reading, tmp_path):
    (words := tmp_path / "words.txt").write_text("dog\n")
    with Engine(reading, safety=Safety(file=words)) as engine:
        assert engine.submit(Request("a puppy", steps=1)).result(60).flagged == ["dog"]
        assert engine.submit(Request("a phantom", steps=1)).result(60).flagged == []


def test_with_adapters_words_are_the_user_s_own(reading):
    assert reading.read_as("a puppy", {"mine": 1.0}) == "a puppy"
    assert reading.read_as('"a puppy"', {"mine": 1.0}) == "a puppy"  # the marks are no part of what is asked
    assert reading.advice([Task("a puppy", "", 0)], loras=["mine"]) == []
    merge(reading)
    assert reading.read_as("a puppy") == "a puppy"


def test_it_is_saved_with_the_pipeline(reading, tmp_path):
    reading.save_pretrained(tmp_path / "copy")
    again = DiffusionFMPipeline.from_pretrained(tmp_path / "copy")
    assert again.phrasebook.phrases == reading.phrasebook.phrases and again.read_as("a puppy") == "a dog"


def test_the_api_tells_the_revised_prompt(reading):
    running = Running(Path(reading.config["_name_or_path"]))
    try:
        answers = [running.draw(prompt=prompt, seed=1, steps=1).json() for prompt in ("a puppy", "a dog")]
    finally:
        running.stop()
    puppy, dog = (answer["data"][0] for answer in answers)
    assert puppy["revised_prompt"] == "a dog" and "revised_prompt" not in dog
    assert 'drawn as "a dog"' in answers[0]["warnings"][0]


def test_a_batch_records_what_it_reads_and_by_which_book(reading, tmp_path):
    rows, how = ["a puppy", "a dog", {"prompt": "a phantom", "steps": 0}], {"steps": 1, "guidance": 1.0}
    summary = make(rows, reading, tmp_path / "out", **how)
    found = {record["prompt"]: record["read_as"] for record in records_of(tmp_path / "out")}
    assert found == {"a puppy": "a dog", "a dog": None, "a phantom": None}
    assert '1 drawn in words that the model knows, such as: "a puppy" as "a dog"' in summary.text()
    kept = make(['"a puppy"'], reading, tmp_path / "kept", **how)
    assert kept.otherwise == 0 and records_of(tmp_path / "kept")[0]["read_as"] == "a puppy"
    reading.phrasebook = Phrasebook.of({phrase: (3, []) for phrase in TOLD})
    with pytest.raises(ValueError, match="already holds row .* with phrasebook '"):
        make(rows, reading, tmp_path / "out", **how)
    run = Options(steps=1, engine="ray").run(reading)
    with pytest.raises(
        ValueError, match="has another phrasebook on this machine: copy the same folder to all"
    ):
        draw_remotely(Options(steps=1, engine="ray").recipe(reading, run), [])


def test_generate_says_what_it_draws(reading, tmp_path, capsys):
    model, out = reading.config["_name_or_path"], tmp_path / "puppy.png"
    assert main(["generate", "a puppy", "-o", str(out), "--model", model, "--steps", "1"]) == 0
    assert 'drawn as "a dog"' in capsys.readouterr().err
    assert read_parameters(out)["read_as"] == "a dog"


def test_the_command_makes_it_of_shards(tmp_path, capsys):
    told = [(f"s{k % 3}", phrase) for k, phrase in enumerate(["dog"] * 3 + ["cat"] * 3 + ["elk"] * 2)]
    with ShardWriter(tmp_path / "shards") as writer:
        for k, (source, phrase) in enumerate(told):
            picture = Image.new("RGBA", (16, 16), (k, 0, 0, 255))
            meta = {"source": source, "phrase": phrase, "split": "train"}
            writer.write(f"{k}", picture, f"a {phrase}", meta)
    (tmp_path / "model").mkdir()
    assert main(["shards", "phrases", str(tmp_path / "shards"), "-o", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / FILES[0]).read_text() == "cat\ndog\n"
    assert Phrasebook.read(tmp_path / "model") is not None
    capsys.readouterr()


def test_well_known_is_what_several_sources_draw():
    told = [
        ("a", "cat"),
        ("b", "cat"),
        ("a", "dog"),
        ("a", "dog"),
        ("a", "flag of fiji"),
        ("b", "flag of fiji"),
    ]
    assert well_known(told, sources=2) == ["cat"]


def test_the_shipped_book_reads_the_scorecard_s_rules_as_they_are_and_holds_no_held_out_phrase():
    words = Vocabulary.read(SHIPPED / "words.txt")
    assert words is not None
    book = Phrasebook.read(SHIPPED, words.words)
    assert book is not None and len(book.phrases) > 2000
    assert book.read_as("two samurai on a sky blue background") == "two ninjas on a sky blue background"
    for prompt in (
        "three cats",
        "a red circle to the left of a teal star",
        "a doctor",
        "a blue banana",
        "a robot owl",
    ):
        assert book.read_as(prompt) == prompt
    held = {row["phrase"] for row in load_assets(FOLDER).words["held_out"]}
    assert len(held) > 100 and not held & {*book.phrases}
