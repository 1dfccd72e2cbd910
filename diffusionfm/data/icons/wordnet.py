"""Other words for what is drawn, from WordNet 3.0 (Fellbaum 1998): synonyms, and what a dictionary would say.

A word has many senses ("crown": a monarch, a tooth, a headdress). The one that is meant is the one that a sentence
encoder finds nearest to the picture's phrase and keywords, among those of things that can be drawn; people only where
there is nothing else ("skunk").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusionfm.data.icons.names import Words
from diffusionfm.sentences import SentenceTeacher

# WordNet's numbers for animals, artifacts, bodies, food, objects, people, phenomena, plants and shapes (lexnames(5WN)).
PEOPLE = "18"
DRAWABLE = {"05", "06", "08", "13", "17", PEOPLE, "19", "20", "25"}
SYNONYMS = 2  # of a picture
LONGEST = 11  # words of a definition: it is cut there
SENSES = 5  # the commonest of a word that are looked at
RARER = 0.05  # of cosine similarity that each rarer sense must make up for
WEAK = frozenset(
    "a an the of or and with for in on to by from that which as one".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Sense:
    """One meaning: the words for it, commonest first, and its definition, empty when there is no short one."""

    words: tuple[str, ...]
    definition: str
    kind: str


class WordNet:
    """The nouns of things that can be drawn, from the unpacked Debian package `wordnet-base`.

    reserved: texts that must not become captions, because a model is judged by them."""

    def __init__(self, folder: Path, reserved: Iterable[str] = ()):
        root = folder / "usr/share/wordnet"
        self.reserved = {bare(text) for text in reserved}
        self.senses = dict(_senses(root / "data.noun"))
        self.found = {word: senses for word, senses in _index(root / "index.noun")}
        self.teacher = SentenceTeacher()
        self._known: dict[Words, Words] = {}

    def enrich(self, words: Words) -> Words:
        """The words with synonyms among their names and a definition, where the phrase is a noun that is known.

        Names and keywords that are reserved are left out."""
        if words not in self._known:
            names, keywords = (tuple(filter(self._free, texts)) for texts in (words.names, words.keywords))
            free = replace(words, names=names, keywords=keywords)
            sense = self._meant(free)
            self._known[words] = self._with(free, sense) if sense else free
        return self._known[words]

    def _meant(self, words: Words) -> Sense | None:
        phrase = words.phrase if words.phrase in self.found else words.phrase.removesuffix(" face")
        senses = [
            self.senses[number] for number in self.found.get(phrase, [])[:SENSES] if number in self.senses
        ]
        senses = [sense for sense in senses if sense.kind != PEOPLE] or senses
        if len(senses) < 2:
            return senses[0] if senses else None
        told = ", ".join([words.phrase, *words.names, *words.keywords[:4]])
        near = self.teacher([told, *(f"{', '.join(s.words)}: {s.definition}" for s in senses)])
        rank = torch.arange(len(senses))
        return senses[int((near[1:] @ near[0] - RARER * rank).argmax())]

    def _with(self, words: Words, sense: Sense) -> Words:
        known = {words.phrase, *words.names}
        others = [word for word in sense.words if word not in known and self._free(word)][:SYNONYMS]
        definition = sense.definition if self._free(sense.definition) else ""
        return replace(words, names=(*words.names, *others), definition=definition)

    def _free(self, text: str) -> bool:
        return bare(text) not in self.reserved


def drawable(folder: Path) -> list[Sense]:
    """Every sense of things that can be drawn, from the unpacked Debian package `wordnet-base`."""
    return [sense for _, sense in _senses(folder / "usr/share/wordnet/data.noun")]


def bare(text: str) -> str:
    """A text without the article before it, in lower case."""
    return re.sub(r"^(a|an|the) ", "", text.lower())


def _senses(file: Path) -> Iterator[tuple[str, Sense]]:
    """(number, sense) of everything in a data file that can be drawn."""
    for line in file.read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):
            facts, _, gloss = line.partition(" | ")
            number, kind, _, count, *rest = facts.split()
            if kind in DRAWABLE:
                words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
                named = tuple(word for word in words if word.islower() and word.replace(" ", "").isalpha())
                if named:
                    yield number, Sense(named, short(gloss), kind)


def _index(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(word, numbers of its senses, commonest first)."""
    for line in file.read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):
            word, _, count, *rest = line.split()
            yield word.replace("_", " "), rest[-int(count) :]


def short(gloss: str) -> str:
    """The beginning of a definition, without remarks and examples; empty when little is left."""
    clause = re.split(r"[;:\"]", re.sub(r"\([^)]*\)|`|'s\b", "", gloss))[0]
    words = clause.lower().replace(",", " ").split()[:LONGEST]
    while words and words[-1] in WEAK:
        words.pop()
    return " ".join(words) if len(words) >= 3 else ""
