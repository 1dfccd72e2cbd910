"""Words that flag a prompt: its pictures come blurred, for whoever wants to see them, or it is refused.

A list of words sees no picture: it misses what is paraphrased and what the model draws unasked.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFilter

MODES = ("flag", "refuse", "off")
LIST = Path(__file__).with_name("flagged.txt")
LOOK_ALIKE = str.maketrans("013457@$!|", "oieastasil")


@dataclass(frozen=True)
class Safety:
    """What is done about a flagged prompt. mode: "flag" draws it and says so, "refuse", or "off"; file: own words.

    ValueError for another mode, or a file that cannot be read or holds no word.
    """

    mode: str = "flag"
    file: Path = LIST
    words: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"safety must be {', '.join(MODES)}, got {self.mode!r}")
        object.__setattr__(self, "words", () if self.mode == "off" else _read(self.file))

    def check(self, prompt: str) -> list[str]:
        """The words of the list that the prompt holds; ValueError where it holds one and such are refused."""
        found = self.find(prompt)
        if found and self.mode == "refuse":
            raise ValueError(f"the prompt says {found[0]!r}, which is not drawn here: leave it out")
        return found

    def find(self, prompt: str) -> list[str]:
        """The words and phrases of the list that stand in the prompt as whole words, in the list's order."""
        plain = {f" {_plain(prompt)} ", f" {_plain(prompt.translate(LOOK_ALIKE))} "}
        return [word for word in self.words if any(f" {word} " in text for text in plain)]


def blurred(picture: Image.Image) -> Image.Image:
    """A picture of which no more than its colours can be told."""
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 8))


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): a list of words is UTF-8, one a line") from error
    words = tuple(dict.fromkeys(_plain(line) for line in lines if not line.startswith("#") and _plain(line)))
    if not words:
        raise ValueError(f"{file} holds no word: write one a line, or switch safety off")
    return words


def _plain(text: str) -> str:
    """Words in lower case with a space between: compatible letters are one, accents and invisible signs are gone."""
    letters = unicodedata.normalize("NFKD", text)
    letters = "".join(c for c in letters if unicodedata.category(c) not in ("Mn", "Cf")).casefold()
    return " ".join(re.findall(r"[^\W_]+", letters))
