"""The little languages inside a prompt: line flags, `{red|blue}` matrices and `__animals__` wildcards."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from diffusionfm.checks import PROMPT_LENGTH

MAX_PROMPTS = 10_000  # that one row's matrix may make
MAX_LINE = 2 * PROMPT_LENGTH + 1000  # characters: a prompt, a negative prompt, and flags
MAX_FILLS = 100  # wildcards in one prompt, those that wildcards bring along included
FLAGS = {
    "w": "width",
    "h": "height",
    "s": "steps",
    "l": "guidance",
    "d": "seed",
    "n": "negative_prompt",
}
_BRACES = re.compile(r"(?<!\\)\{([^{}]*)\}")
_NESTED = re.compile(r"(?<!\\)\{[^{}]*(?<!\\)\{[^{}]*\}")
_WILDCARD = re.compile(r"(?<!\\)__([A-Za-z0-9]+(?:[_/-][A-Za-z0-9]+)*)__")


def parse_line(line: str) -> dict[str, str]:
    """A line of a txt file, "a red apple --w 64 --n blurry", as {"prompt": ..., "width": "64", ...}.

    The flags are those of other trainers' prompt files. ValueError for an unknown one, for one without a value, and for
    a line too long to hold a prompt.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"the line has {len(line):,} characters: shorten it to {MAX_LINE:,} or fewer")
    prompt, *parts = re.split(r"(?<!\S)--(?=[A-Za-z])", line)
    found = {"prompt": prompt.strip()}
    for part in parts:
        word, _, value = part.strip().partition(" ")
        if word not in FLAGS:
            raise ValueError(f"unknown flag --{word}: use {', '.join(f'--{flag}' for flag in FLAGS)}")
        if not value.strip():
            raise ValueError(f"--{word} has no value: write one after it")
        found[FLAGS[word]] = value.strip()
    return found


class Wildcards:
    """The lines of the files NAME.txt in a folder, for `__NAME__` in prompts; without a folder there are none.

    `{__NAME__}` in a prompt stands for every line in turn, as `{one|two}` does; `__NAME__` for one line, picked by a
    key. A line may hold wildcards itself. Blank lines and those that begin with # are no lines.
    """

    def __init__(self, folder: Path | None = None):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"no wildcards folder at {folder}: it holds NAME.txt files, a choice a line")
        self.folder = folder
        self.lines = lru_cache(1000)(self._lines)

    def _lines(self, name: str) -> list[str]:
        if self.folder is None:
            raise ValueError(
                f"the prompt asks for __{name}__: give its folder (--wildcards DIR), or write \\__{name}__"
            )
        file = self.folder / f"{name}.txt"
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the prompt asks for __{name}__, but {file} cannot be read: {error}") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise ValueError(f"{file} has no lines to choose from: write one choice a line")
        return lines

    def expand(self, prompt: str) -> Iterator[str]:
        """Every prompt of a matrix, the last braces changing fastest; the prompt itself where there is none.

        ValueError, before the first, when there are more than MAX_PROMPTS, a wildcard is not there, or braces nest.
        """
        if "{" not in prompt or len(prompt) > PROMPT_LENGTH:  # too long a one is refused later, by name
            return iter([prompt])
        if _NESTED.search(prompt):
            raise ValueError(
                "braces inside braces cannot be read: write all choices in one pair, or \\{ for a brace"
            )
        pieces: list[list[str]] = []
        at = 0
        for match in _BRACES.finditer(prompt):
            wild = _WILDCARD.fullmatch(match[1])
            if wild is None and "|" not in match[1]:
                continue
            pieces += [
                [prompt[at : match.start()]],
                self.lines(wild[1]) if wild else match[1].split("|"),
            ]
            at = match.end()
        pieces.append([prompt[at:]])
        count = math.prod(map(len, pieces))
        if count > MAX_PROMPTS:
            raise ValueError(f"the prompt makes {count:,} prompts: at most {MAX_PROMPTS:,}, split it")
        return map("".join, itertools.product(*pieces))

    def fill(self, prompt: str, key: str) -> str:
        """The prompt with a line, picked by `key` and its place, for each `__NAME__`; `\\{` and `\\__` made plain.

        ValueError when a wildcard is not there, or wildcards bring each other along without end.
        """
        if len(prompt) > PROMPT_LENGTH:
            return prompt
        for place in range(MAX_FILLS + 1):
            match = _WILDCARD.search(prompt)
            if match is None:
                return prompt.replace("\\{", "{").replace("\\__", "__")
            lines = self.lines(match[1])
            digest = hashlib.sha256(f"{key} {place}".encode("utf-8", "surrogatepass")).digest()
            pick = lines[int.from_bytes(digest[:8], "big") % len(lines)]
            prompt = prompt[: match.start()] + pick + prompt[match.end() :]
        raise ValueError(f"the prompt has more than {MAX_FILLS} wildcards, or they bring each other along")
