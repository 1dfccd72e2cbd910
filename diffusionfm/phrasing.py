"""How captions are phrased: articles, styles and backgrounds, in the same words for the corpus and the studio."""

from __future__ import annotations

import re
import unicodedata


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, where it takes one."""
    if not phrase.strip():
        return phrase
    head, last = phrase.split()[0], phrase.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if (
        plural
        or head in {"a", "an", "the", "two", "three", "four"}
        or "flag of" in phrase
        or last in MASS
        or head.isdigit()
    ):
        return phrase
    return f"{'an' if VOWEL.match(head) else 'a'} {phrase}"


# Heads that begin with a vowel's sound, not its letter: an hourglass, a unicorn.
VOWEL = re.compile(
    r"(?!eu|one\b|once\b|ufo|uk\b|us\b|use|usual|uni(?!n|m)|ur[aei]|utensil|uter|ute)[aeiou]|hour|honest|honou?r|heir",
    re.I,
)
MASS = frozenset(
    "rice bread water fire snow rain ice sushi cheese bacon butter salt wind lightning fog money sake".split()  # noqa: SIM905
)


def plural(phrase: str) -> str:
    """A phrase in the plural: "red star" -> "red stars", "box" -> "boxes", "mouse" -> "mice"."""
    head, _, last = phrase.rpartition(" ")
    if last in IRREGULAR:
        many = IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        many = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{head} {many}".strip()


IRREGULAR = {
    "mouse": "mice", "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "knife": "knives", "wolf": "wolves", "leaf": "leaves", "loaf": "loaves",
    "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer", "potato": "potatoes", "tomato": "tomatoes",
    "cactus": "cacti", "bison": "bison", "shrimp": "shrimp", "squid": "squid",
}  # fmt: skip

# Words that say how others hang together, or are said to be polite: a prompt may have them, captions or not.
_SMALL = """
a about above across after all also am an and any are around as at be been behind being below beneath beside
between both but by can could d do does doing don't down draw drawing each every few for from get give had
has have he her here him his how i if image in inside into is it it's its just kind let like ll made make
many me more most much my near next no not of off on one only onto or other our out outside over own per
picture please put s same she should show so some such t than that the their them then there these they
thing this those through to too top toward towards under until up us using very want was we were what when
where which while who whose will with within without would you your
"""
SMALL_WORDS = frozenset(_SMALL.split())


def words_in(text: str) -> list[str]:
    """The words of a text in their order, in lower case; numbers are none."""
    return re.findall(
        r"[^\W\d_]+(?:'[^\W\d_]+)*", unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    )


NUMBERS = ("one", "two", "three", "four")
"""How many things of a kind a caption may count."""
STYLES = [
    "flat emoji",
    "3D emoji",
    "round emoji",
    "blob emoji",
    "cartoon emoji",
    "outlined emoji",
    "clip art",
    "sticker",
    "flat icon",
    "gradient icon",
    "plump icon",
    "hand drawn icon",
    "low poly icon",
    "colored line icon",
    "pixel icon",
    "stencil icon",
    "map icon",
]
"""Styles as the shipped model's captions name them."""


def in_style(style: str, phrase: str) -> str:
    """A phrase drawn in a style: "a flat emoji of a cat"."""
    return f"{article(style)} of {phrase}"


def on_background(color: str) -> str:
    """The words that follow a phrase drawn on a colour: " on an orange background"."""
    return f" on {article(color)} background"
