"""The words a model learned: which of a prompt's it never met, and the nearest ones it did."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from diffusionfm.phrasing import SMALL_WORDS, words_in

FILE = "words.txt"  # in a model's folder
MOST = 2**20  # bytes that are read of one
ALIKE = 0.8  # the least likeness of spelling, as difflib has it
ENDINGS = "y ful er ers or ing ed ish like ly ness less al ist ists ic able man woman".split()  # noqa: SIM905


class Vocabulary:
    """The words that the captions of the training pictures had, most frequent first.

    Near words are found by spelling and by their parts. The text encoder is no help: of a word that no caption had it
    knows but the letters, and puts "paris" beside "parasol".
    """

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self._rank = {word: k for k, word in enumerate(self.words)}
        self.near = lru_cache(1024)(self._near)

    @classmethod
    def read(cls, path: Path) -> Vocabulary | None:
        """Of a file with a word on each line, as `learned_words` gives them; None where there is no file."""
        if not path.is_file():
            return None
        if path.stat().st_size > MOST:
            raise ValueError(f"{path} is over 1 MiB: it is not a list of a model's words")
        return cls(path.read_text(encoding="utf-8").split())

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that no caption had in any form, each once; small words and numbers aside."""
        words = dict.fromkeys(words_in(prompt))
        return [word for word in words if word not in SMALL_WORDS and not forms(word) & self._rank.keys()]

    def advice(self, words: Iterable[str]) -> list[str]:
        """A sentence for each of some words that the model never learned."""
        found = []
        for word in words:
            near = self.near(word)
            instead = f"; near ones: {', '.join(near)}" if near else ""
            found.append(f"the model never learned the word {word!r}{instead}")
        return found

    def _near(self, word: str, most: int = 3) -> tuple[str, ...]:
        """Learned words like this one: its parts, then others of nearly its letters, the frequent ones first."""
        spelled = difflib.get_close_matches(word, self.words, n=8, cutoff=ALIKE)
        spelled.sort(key=lambda one: (one[0] != word[0], self._rank[one]))
        found: list[str] = []
        for one in [*self._parts(word), *spelled]:
            if not any(forms(one) & forms(other) for other in found):
                found.append(one)
        return tuple(found[:most])

    def _parts(self, word: str) -> list[str]:
        """Learned words that it is put together of, or begins with: space and ship, joy in joyful."""
        for cut in range(len(word) - 1, 2, -1):
            head, tail = word[:cut], word[cut:]
            if head not in self._rank:
                continue
            if len(tail) > 2 and tail in self._rank:
                return [head, tail]
            if tail in ENDINGS or (tail[0] == head[-1] and tail[1:] in ENDINGS) or cut >= max(5, len(tail)):
                return [head]
        return []


def learned_words(captions: Iterable[Iterable[str]], least: int = 3) -> list[str]:
    """The words that the captions of at least so many pictures have, most frequent first; a list for each picture."""
    counts = Counter(word for of_one in captions for word in {w for text in of_one for w in words_in(text)})
    return [word for word, count in sorted(counts.items(), key=lambda i: (-i[1], i[0])) if count >= least]


def well_known(told: Iterable[tuple[str, str]], sources: int = 3) -> list[str]:
    """The phrases, flags apart, that so many sources draw, of (source, phrase) of every sample; sorted."""
    drawn_by: dict[str, set[str]] = {}
    for source, phrase in told:
        drawn_by.setdefault(phrase, set()).add(source)
    return sorted(text for text, by in drawn_by.items() if len(by) >= sources and "flag of" not in text)


def forms(word: str) -> frozenset[str]:
    """A word, its singular and its plural, as far as the ending tells."""
    forms = {word, f"{word}s", f"{word}es"}
    for ending, other in (("'s", ""), ("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            forms.add(word.removesuffix(ending) + other)
    if word.endswith("y"):
        forms.add(f"{word[:-1]}ies")
    return frozenset(forms)
