"""Which language captions are likely in: by their script, and in Latin script by the small words they use."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

SCRIPTS = {
    "CJK": "Chinese or Japanese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "CYRILLIC": "Cyrillic script",
    "GREEK": "Greek",
    "ARABIC": "Arabic script",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari script",
    "THAI": "Thai",
}
# Words that one of these languages uses all the time and the others do not.
SMALL_WORDS = {
    "English": "the of and with an on is at by from his her in to for drawing picture white black red blue green",
    "German": "der die das ein eine mit und auf von im ist zum zur dem den des weiß schwarz rot blau grün",
    "French": "le la les un une des et avec sur dans du est au aux blanc noir rouge bleu vert",
    "Spanish": "el los las una del con y en sobre es para blanco negro rojo azul verde",
    "Italian": "il lo gli uno di che con e sul nel della bianco nero rosso blu verde",
    "Portuguese": "o os as um uma do da com em no na sobre branco preto vermelho azul verde",
    "Dutch": "het een van met op en is naar wit zwart rood blauw groen",
}
WORDS = {language: frozenset(words.split()) for language, words in SMALL_WORDS.items()}
UNTOLD = "not told"


def language_of(caption: str) -> str:
    """The likely language of a caption, or "not told": a guess, right more often on sentences than on names."""
    letters = [unicodedata.name(c, "?").split()[0].split("-")[0] for c in caption if c.isalpha()]
    scripts = Counter(SCRIPTS[script] for script in letters if script in SCRIPTS)
    if scripts and 2 * scripts.total() > len(letters):
        return "Japanese" if "Japanese" in scripts else scripts.most_common(1)[0][0]
    found = caption.lower().replace(",", " ").replace(".", " ").split()
    scores = {language: float(sum(w in known for w in found)) for language, known in WORDS.items()}
    # "a" is English's commonest small word, and Italian's, Spanish's and Portuguese's "to": it decides ties only.
    scores["English"] += 0.5 * (found[:1] in (["a"], ["an"]))
    best = max(scores, key=lambda language: scores[language])
    alone = sorted(scores.values())[-2] < scores[best]
    return best if scores[best] and alone else UNTOLD


def languages(captions: Iterable[str]) -> dict[str, int]:
    """How many captions are likely in which language, most first."""
    return dict(Counter(map(language_of, captions)).most_common())
