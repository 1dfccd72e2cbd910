"""Synonyms and definitions: the sense that is meant, short, and never what a model is judged by."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusionfm.data.icons import captions as cap
from diffusionfm.data.icons.names import Words
from diffusionfm.data.icons.wordnet import WordNet, bare, short
from diffusionfm.evaluate.words import OWN_WORDS

RESERVED = Path("configs/data/reserved_words.txt")
DATA = """  1 a licence, on lines that begin with two spaces
00000100 18 n 02 skunk 0 rotter 0 000 | a person who is deemed to be despicable; "only a rotter would do that"
00000200 05 n 02 skunk 1 polecat 0 000 | American musteline mammal (typically ejecting an odor) with black fur
00000300 04 n 01 skunk 2 000 | a defeat in a game where one side fails to score
00000400 06 n 03 car 0 auto 0 automobile 0 000 | a motor vehicle with four wheels; usually propelled by an engine
00000500 06 n 02 taxi 0 cab 0 000 | a car driven by a person whose job is to take passengers where they want to go
00000600 20 n 02 rose 0 Rosa_alba 0 000 | any of many shrubs of the genus Rosa that bear roses
"""
INDEX = """  1 a licence
skunk n 3 0 3 0 00000100 00000300 00000200
car n 1 0 1 0 00000400
taxi n 1 0 1 0 00000500
rose n 1 0 1 0 00000600
"""


def unpacked(root: Path) -> Path:
    """A folder as Debian's package has it, of the few senses above."""
    folder = root / "usr/share/wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(DATA)
    (folder / "index.noun").write_text(INDEX)
    return root


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory) -> WordNet:
    root = unpacked(tmp_path_factory.mktemp("wordnet"))
    return WordNet(root, ["a cab", "any of many shrubs of the genus rosa that bear roses"])


def test_the_sense_of_a_thing_that_can_be_drawn_is_taken(wordnet):
    found = wordnet.enrich(Words("skunk", keywords=("animal", "stink")))
    assert found.names == ("polecat",)
    assert found.definition == "american musteline mammal with black fur"


def test_names_that_are_known_are_not_repeated(wordnet):
    found = wordnet.enrich(Words("car", names=("automobile",)))
    assert found.names == ("automobile", "auto") and found.definition == "a motor vehicle with four wheels"


def test_reserved_words_become_no_caption(wordnet):
    taxi = wordnet.enrich(Words("taxi", names=("cab", "yellow car"), keywords=("cab", "drive")))
    rose = wordnet.enrich(Words("rose"))
    assert taxi.names == ("yellow car",) and taxi.definition.startswith("a car driven")
    assert taxi.keywords == ("drive",)
    assert rose.definition == "" and rose.names == ()


def test_what_is_no_noun_stays_as_it_is(wordnet):
    words = Words("airport plane transit", keywords=("fly",))
    assert wordnet.enrich(words) == words


def test_definitions_are_cut_and_end_on_a_word_that_can_end_them():
    assert short('a thing (of any kind); for example: "a stone"') == ""
    assert short("a dwelling that serves as living quarters for twelve families or more") == (
        "a dwelling that serves as living quarters for twelve families"
    )


def test_a_definition_is_a_caption_with_ink_and_ground():
    words = Words("car", definition="a motor vehicle with four wheels")
    texts = cap.captions(words, "game icon", "red", "teal", 0.0, False)
    assert "a motor vehicle with four wheels in red on a teal background" in texts


def test_all_that_the_scorecard_asks_in_other_words_is_reserved():
    reserved = {bare(line) for line in RESERVED.read_text().splitlines()}
    assert reserved >= {bare(prompt) for prompt in OWN_WORDS}
