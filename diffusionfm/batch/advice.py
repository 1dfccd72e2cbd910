"""What prompts of a batch say in vain: words that the model never learned, and ends that its encoder cannot read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from diffusionfm.batch.jobs import Job

SHOWN = 5  # words and rows that are kept
WORD = 50  # letters of a word that are kept


@dataclass
class Advice:
    """How many pictures' prompts the model does not take in whole, and a few of the words and rows.

    unknown: pictures asked for in words it never learned, `words` some of them. cut: pictures whose prompt, or negative
    prompt, is longer than its encoder reads, `rows` some of their ids.
    """

    unknown: int = 0
    words: list[str] = field(default_factory=list)
    cut: int = 0
    rows: list[str] = field(default_factory=list)

    def count(self, job: Job, unread: Callable[[str], tuple[str, list[str]]]) -> None:
        """Add a job; unread: see `Painter.unread`."""
        found = [unread(text) for text in (job.prompt, job.settings["negative_prompt"]) if text]
        words = [word[:WORD] for _, unknown in found for word in unknown]
        if words:
            self.unknown += 1
            keep(self.words, words)
        if any(lost for lost, _ in found):
            self.cut += 1
            keep(self.rows, [job.id])

    def lines(self) -> list[str]:
        """As text; none where there is nothing to say."""
        said = []
        if self.unknown:
            told = ", ".join(self.words)
            said.append(f"{self.unknown:,} pictures have words that the model never learned, such as: {told}")
        if self.cut:
            told = ", ".join(self.rows)
            said.append(f"{self.cut:,} pictures have longer prompts than the model reads, such as: {told}")
        return said


def keep(kept: list[str], new: list[str]) -> None:
    """Add what is new to the few that are kept, while there is room."""
    kept += [one for one in dict.fromkeys(new) if one not in kept][: SHOWN - len(kept)]
