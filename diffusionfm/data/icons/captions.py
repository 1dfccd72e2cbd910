"""Captions of the open-icons corpus: what is drawn, in which style, ink and background; and what is held out."""

from __future__ import annotations

import numpy as np

from diffusionfm.colors import COLORS, INKS, rgb
from diffusionfm.data.icons.names import Words
from diffusionfm.data.icons.sources import share
from diffusionfm.phrasing import article, on_background


def is_held_out(phrase: str, fraction: float) -> bool:
    """Whether a phrase belongs to the held-out set: a pure function of the phrase, so the same in every style."""
    return share(f"held-out:{' '.join(phrase.lower().split())}") < fraction


def captions(
    words: Words, style: str, ink: str | None, background: str | None, held_out: float, is_held: bool
) -> list[str]:
    """All captions of one picture, the fullest first. A background is named in each of them or in none.

    Args:
        words: what is drawn. style: the style's words. ink: colour word of a one-colour drawing.
        background: colour word of a drawn background. held_out: held-out share; other names and keywords
        that are held-out phrases themselves are dropped from training captions.
    """
    allowed = lambda text: is_held or not is_held_out(text, held_out)  # noqa: E731
    phrase = f"{words.phrase}, {words.tone}" if words.tone else words.phrase
    on = on_background(background) if background else ""
    styled = article(f"{ink} {style}" if ink else style)
    bare = f"{ink} {phrase}" if ink and "flag of" not in phrase else phrase
    names = [n for n in words.names if allowed(n)]
    keywords = [k for k in words.keywords if allowed(k)]
    subject = phrase.removeprefix("flag of ") if style.endswith("flag") else article(phrase)
    found = [f"{styled} of {subject}{on}", f"{article(bare)}{on}", f"{bare}{on}"]
    found += [f"{article(f'{ink} {n}' if ink else n)}{on}" for n in names]
    found += [f"{styled} of {article(n)}{on}" for n in names[:1]]
    if words.definition and allowed(words.definition):
        found.append(f"{words.definition}{f' in {ink}' if ink else ''}{on}")
    if keywords:
        found.append(f"{bare}, {', '.join(keywords[:4])}{on}")
        found.append(f"{styled} of {subject}, {', '.join(keywords[:2])}{on}")
    return list(dict.fromkeys(found))


def pick_ink(key: str, rng: np.random.Generator) -> str:
    """The ink of a one-colour drawing: black for a third, else any colour dark or strong enough to see."""
    inks = [c for c in INKS if c != "black"]
    return "black" if share(f"ink:{key}") < 0.33 else str(rng.choice(inks))


def pick_background(mean: tuple[float, float, float], rng: np.random.Generator) -> str:
    """A background colour that stands off from the drawing's mean colour (distance of 90 or more in RGB)."""
    far = [c for c in COLORS if np.linalg.norm(np.subtract(rgb(c), mean)) >= 90]
    return str(rng.choice(far or ["white"]))
