"""The phrases a model knows well, and the one of them that is meant by words it does not know.

A small text encoder trained on captions cannot know that trainers are shoes. A sentence encoder trained on far more
text can tell which caption is nearest (compare prompt expansion in Fooocus; here nothing is added, and it is said).
"""

from __future__ import annotations

import difflib
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from diffusionfm.colors import COLORS
from diffusionfm.phrasing import NUMBERS, SMALL_WORDS, STYLES, article, plural, words_in
from diffusionfm.vocabulary import ALIKE, forms

if TYPE_CHECKING:
    from diffusionfm.sentences import SentenceTeacher

# In a model's folder: a phrase a line, and what the sentence encoder makes of each.
FILES = ("phrases.txt", "phrases.safetensors")
MOST = 2**20  # bytes that are read of one
RULES = 2  # one more whenever a change makes the same book read otherwise
COMMON = 2000  # the words of most pictures' captions: a model knows these whether a phrase has them or not
SLIP = 0.87  # likeness of spelling, as difflib has it, at which a word is taken for a slip before it is looked up
LEAST = 0.35  # cosine below which no phrase is near
DRAWN = 0.06  # what a phrase gains in cosine for each e-fold of sources that draw it: these the model draws better
OTHERS = 4  # captions of a phrase, beside itself, that tell what it means

_COLOR = "|".join(sorted(COLORS, key=len, reverse=True))
_STYLED = re.compile(r"^(an? (?:[\w-]+ ){0,4}(?:emoji|icon|clip art|sticker) of )", re.I)
_GROUND = re.compile(r"( on an? (?:[\w-]+ ){1,2}background)$", re.I)
_QUOTED = re.compile(r'^["“]([^"“”]*[^\s"“”][^"“”]*)["”]$')
_PLACES = "(?:to the )?(?:left|right) of|above|below"
_JOINED = re.compile(rf"( and | (?:{_PLACES}|over|under) )", re.I)
_JOINED_TOLD = re.compile(rf"( and | (?:{_PLACES}) )", re.I)  # who jumps over a fence is not above it
_THING = re.compile(rf"^(?:(an?|the|{'|'.join(NUMBERS)}) )?((?:(?:{_COLOR}) )*)(.+)$", re.I)
# More of a thing than a model counts.
_MANY = """
countless dozen dozens eight eighteen eighty eleven few fifteen fifty five forty fourteen hundred hundreds lots many
million nine nineteen ninety seven seventeen seventy several six sixteen sixty ten thirteen thirty thousand thousands
twelve twenty
"""
_HEADS = """
animal bird building creature device drink food fruit garment insect instrument machine man person place plant
someone something somewhere thing tool toy vegetable vehicle woman
"""
_HAS = re.compile(r"\b(?:with|wearing|holding|carrying|having|has|of)\b", re.I)
_TOLD = re.compile(  # "a sweet food that ..."; "what falls ...", though not "what a cat"
    rf"(?:(?:(?:an?|some|the) )?(?:[\w-]+ ){{0,3}}(?:{'|'.join(_HEADS.split())})s? (?:[\w,-]+ ){{0,4}}"
    r"(?:that|which|who|whose|where|you|used (?:to|for|by|in|as))|what (?!an? |is |are ))\b(?!-)",
    re.I,
)
_PLANTS = {"lavender", "mint", "navy", "peach"}  # and ships, rather than colours, amid other words
_WITHIN = re.compile(rf"\b({'|'.join(color for color in COLORS if color not in _PLANTS)}) ", re.I)
SHORT = 3  # words a thing has at most where several are joined by "and"; longer ones are one description
PARTS = 8  # things of a prompt that are looked up at most: longer lists stay as they are
_STRUCTURE = {
    word for text in (*COLORS, *STYLES, *NUMBERS, "left right background") for word in words_in(text)
}


class Phrasebook:
    """Phrases that a model knows well, with a bit for each feature of what their captions mean.

    phrases: captions without their articles. signs: uint8 (n, width / 8), whether a feature is above its mean, as
    `np.packbits` has it. spread: float16 (width,), each feature's standard deviation. sources: uint8 (n,), how many
    sources draw it. common: other words that the model knows.
    """

    def __init__(
        self,
        phrases: Sequence[str],
        signs: np.ndarray,
        spread: np.ndarray,
        sources: np.ndarray,
        common: Iterable[str] = (),
    ):
        if signs.dtype != np.uint8 or signs.shape != (len(phrases), spread.size // 8) or not len(phrases):
            raise ValueError("a phrasebook needs a row of signs for each of its phrases: make it anew")
        if not np.isfinite(spread).all() or not spread.any():
            raise ValueError("a phrasebook needs phrases that mean different things: give it more of them")
        if sources.shape != (len(phrases),) or not sources.all():
            raise ValueError("a phrasebook needs how many sources draw each of its phrases: make it anew")
        if list(phrases) != sorted(set(phrases)):
            raise ValueError(
                "a phrasebook has its phrases in the order of the alphabet, each once: make it anew"
            )
        self.phrases, self.signs, self.spread, self.sources = list(phrases), signs, spread, sources
        self._phrases = {*phrases}
        known = dict.fromkeys(
            [*common, *(word for text in phrases for word in words_in(text)), *sorted(_STRUCTURE)]
        )
        self._spellings = list(known)
        self.words = {form for word in known for form in forms(word)} | SMALL_WORDS
        self.read_as = lru_cache(1024)(self._read_as)

    @classmethod
    def of(cls, told: Mapping[str, tuple[int, Sequence[str]]], common: Iterable[str] = ()) -> Phrasebook:
        """The book of some phrases, each with how many sources draw it and its captions, the most frequent first.

        What a phrase means is the mean of itself and a few captions that name neither style nor ground: keywords,
        synonyms, definitions. ValueError where the sentence encoder is not installed.
        """
        phrases = sorted(told)
        texts = [[article(phrase), *_others(phrase, told[phrase][1])] for phrase in phrases]
        read = _features([text for some in texts for text in some])
        means = torch.stack([some.mean(0) for some in read.split([len(some) for some in texts])])
        means = torch.nn.functional.normalize(means, dim=-1)
        signs = np.packbits((means > means.mean(0)).numpy(), axis=1)
        spread = means.std(0, unbiased=False).numpy().astype(np.float16)
        sources = np.array([min(told[phrase][0], 255) for phrase in phrases], np.uint8)
        return cls(phrases, signs, spread, sources, common)

    @classmethod
    def read(cls, folder: Path, vocabulary: Sequence[str] = ()) -> Phrasebook | None:
        """Of a model's folder; None where it has none. ValueError, one line, for files that are none of ours.

        vocabulary: the words of its captions, most frequent first."""
        text, numbers = (folder / name for name in FILES)
        if not text.is_file() or not numbers.is_file():
            return None
        for path in (text, numbers):
            if path.stat().st_size > MOST:
                raise ValueError(f"{path} is over 1 MiB: it is no part of a phrasebook")
        try:
            phrases = text.read_text(encoding="utf-8").splitlines()
            return cls(phrases, **load_file(numbers), common=vocabulary[:COMMON])
        except (ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"{numbers} does not fit {text.name} ({error}): copy both again") from error

    def files(self) -> dict[str, bytes]:
        """What `read` reads, by name."""
        numbers = {"signs": self.signs, "spread": self.spread, "sources": self.sources}
        return {FILES[0]: "\n".join([*self.phrases, ""]).encode(), FILES[1]: save(numbers)}

    @property
    def digest(self) -> str:
        """12 hex digits of the SHA-256 over its files, words and rules: which book reads."""
        return hashlib.sha256(
            b"\n".join([b"%d" % RULES, *self.files().values(), *map(str.encode, self._spellings)])
        ).hexdigest()[:12]

    def strange(self, text: str) -> list[str]:
        """Its words that no phrase of the book has in any form; small words, colours, numbers and styles are none."""
        return [word for word in words_in(text) if not forms(word) & self.words]

    def _read_as(self, prompt: str) -> str:
        """The prompt with slips of spelling mended, and each thing with a strange word in the nearest phrase's words.

        So is a thing told by what it does ("something that you sit on"), however well its words are known. Style,
        ground, places, and a colour or a number up to four before a thing stay as they are; more than four of a thing
        stay as asked. A prompt with neither, or nothing near, comes back as it was; a flag too, for the nearest flag
        is a wrong one. A prompt in double quotes comes back without them. Safe to call from any thread.
        """
        text = " ".join(prompt.split())
        if within := quoted(text):
            return within
        style, core, ground = "", text.rstrip(".!").replace("’", "'"), ""
        if styled := _STYLED.match(core):
            style, core = styled[1], core[styled.end() :]
        if grounded := _GROUND.search(core):
            core, ground = core[: grounded.start()], grounded[1]
        if not (self.strange(core) or self._told(core)) or "flag of" in core.lower():
            return prompt
        parts = self._parts(core)
        if len(parts) > 2 * PARTS:
            return prompt
        known = [part if k % 2 else self._known(part) for k, part in enumerate(parts)]
        return prompt if known == parts else f"{style}{''.join(known)}{ground}"

    def _parts(self, core: str) -> list[str]:
        """Things and what joins them, in turn. Where only "and" does, long things may be one: "purrs and sleeps".

        Not where each has its own article, unless one has things itself: "a face with starry eyes and a smile".
        """
        parts = (_JOINED_TOLD if self._told(core) else _JOINED).split(core)
        if any(joint.lower() != " and " for joint in parts[1::2]):
            return parts
        found = [_THING.match(part) for part in parts[::2]]
        long = any(match is None or len(words_in(match[3])) > SHORT for match in found)
        apart = all(match and (match[1] or self._told(match[0])) for match in found[1:])
        return [core] if long and not (apart and not _HAS.search(core)) else parts

    def _told(self, text: str) -> bool:
        """Whether a text, no phrase of the book, tells of a thing by what it does: "something that you sit on"."""
        return bool(_TOLD.match(text)) and _THING.sub(r"\3", text).lower() not in self._phrases

    def _known(self, thing: str) -> str:
        """A thing in words of the book: "two red puppies" -> "two red dogs", "a pizzza" -> "a pizza"."""
        strange, told = self.strange(thing), self._told(thing)
        if not (strange or told) or not thing.isascii() or re.search(r"\d", thing):
            return thing
        spelled = self._spelled(strange[0], SLIP) if len(strange) == 1 and not told else None
        if spelled is None:
            many, colors, name = _THING.match(thing).groups()  # type: ignore[union-attr]
            if name.split()[0].lower() in _MANY.split():
                return thing
            within = [] if told else _colors_within(name)
            if nearest := self.nearest(name) or (self.nearest(_WITHIN.sub("", name)) if within else None):
                colors += "".join(f"{color} " for color in within if f" {color} " not in f" {nearest} ")
                if (many or "").lower() not in NUMBERS[1:]:
                    return article(f"{colors}{nearest}")
                head = re.search(r" (of|with|in|on) ", nearest) is None and article(nearest) != nearest
                return f"{many} {colors}{plural(nearest)}" if head else thing
            spelled = self._spelled(strange[0], ALIKE) if len(strange) == 1 else None
        return re.sub(rf"\b{re.escape(strange[0])}\b", spelled, thing, flags=re.I) if spelled else thing

    def _spelled(self, word: str, alike: float) -> str | None:
        """The known word that one has at least so much likeness with; None for words that the sentence encoder has."""
        if _encoder().has(word):
            return None
        near = difflib.get_close_matches(word, self._spellings, n=4, cutoff=alike)
        return next((one for one in near if one[0] == word[0]), None)

    def nearest(self, text: str) -> str | None:
        """The phrase that means most nearly what a text does, rather one that many draw; None where none is near."""
        spread = self.spread.astype(np.float32)
        asked = _features([article(text)])[0].numpy()
        likeness = (np.unpackbits(self.signs, axis=1) * 2.0 - 1) @ (asked * spread) / np.linalg.norm(spread)
        if not likeness.max() >= LEAST:
            return None
        worth = np.where(likeness >= LEAST, likeness + DRAWN * np.log(self.sources), -np.inf)
        return self.phrases[int(worth.argmax())]


def _colors_within(name: str) -> list[str]:
    """Colours amid a thing's other adjectives, which the nearest phrase may lose: of "tiny red locomotive" red."""
    words = words_in(name)
    short = len(words) <= SHORT + 1 and not SMALL_WORDS & {*words}
    return [color.lower() for color in _WITHIN.findall(name)] if short else []


def quoted(prompt: str) -> str:
    """What stands within the double quotes around a whole prompt; "" where it has none."""
    found = _QUOTED.match(prompt.strip())
    return found[1].strip() if found else ""


def _others(phrase: str, captions: Iterable[str]) -> list[str]:
    """The first few captions that say what is drawn in other words than the phrase's own."""
    told = (text for text in captions if not _STYLED.match(text) and not _GROUND.search(text))
    return [text for text in told if text not in (phrase, article(phrase))][:OTHERS]


_LOADING = threading.Lock()


@torch.inference_mode()
def _features(texts: list[str], size: int = 64) -> Tensor:
    """Unit features (n, width) of texts."""
    return torch.cat([_encoder()(texts[k : k + size]) for k in range(0, len(texts), size)])


def _encoder() -> SentenceTeacher:
    """The sentence encoder, loaded when it is first asked for."""
    with _LOADING:
        return _loaded()


@cache
def _loaded() -> SentenceTeacher:
    from diffusionfm.sentences import SentenceTeacher

    return SentenceTeacher()
