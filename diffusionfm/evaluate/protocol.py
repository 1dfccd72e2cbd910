"""What is drawn and in which order, with which seeds: the same for every model, versioned and hashed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

from diffusionfm.evaluate.rules import LINES, SAMPLES, Scene
from diffusionfm.evaluate.words import PEOPLE
from diffusionfm.phrasing import article

T = TypeVar("T")
VERSION = 1
"""Raise it with any change to prompts, seeds, rules, thresholds or figures: scores of two versions never compare."""

OWN_SEEDS = 2  # pictures of each prompt in words of one's own
PEOPLE_SEEDS = 64
QUICK = {"held_out": 32, "taught": 20, "own_words": 20, "unseen": 24}
QUICK_RULES = 8
QUICK_PEOPLE = 3


@dataclass(frozen=True)
class Item:
    """A picture to draw: the section it counts in, its prompt and seed, and what it must show.

    truth: the phrase to recognise it by, None where none is asked. scene: what the rules of a line ask for.
    row: the number of the real picture it stands beside, among the held-out or the taught ones.
    """

    section: str
    prompt: str
    seed: int
    truth: str | None = None
    scene: Scene | None = None
    row: int | None = None


@dataclass
class Protocol:
    """The items of a run, section after section."""

    items: list[Item]
    assets: str
    quick: bool = False

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal: version, every item, and the assets they are judged by."""
        told = [VERSION, self.assets, [asdict(item) for item in self.items]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def numbers(self, section: str) -> list[int]:
        """Where a section's items stand."""
        return [i for i, item in enumerate(self.items) if item.section == section]


def protocol(words: dict[str, Any], assets: str, quick: bool = False) -> Protocol:
    """The full protocol, or an even share of each of its sections that fits a few minutes."""
    sections = {name: rule_items(name, 1000 * k) for k, name in enumerate(LINES)}
    sections["held_out"] = held_out_items(words)
    sections["taught"] = [
        Item("taught", article(phrase), 6000 + k, phrase, row=k) for k, phrase in enumerate(words["taught"])
    ]
    sections["own_words"] = [
        Item("own_words", prompt, 7000 + k * OWN_SEEDS + seed, phrase, row=words["taught"].index(phrase))
        for k, (prompt, phrase) in enumerate(words["own_words"].items())
        for seed in range(OWN_SEEDS)
    ]
    sections["unseen"] = [Item("unseen", prompt, 8000 + k) for k, prompt in enumerate(words["unseen"])]
    sections["people"] = [Item("people", p, 9000 + k) for p in PEOPLE for k in range(PEOPLE_SEEDS)]
    if quick:
        people = [item for item in sections.pop("people") if item.seed < 9000 + QUICK_PEOPLE]
        sections["held_out"] = [item for item in sections["held_out"] if item.truth]
        sections = {name: spread(items, QUICK.get(name, QUICK_RULES)) for name, items in sections.items()}
        sections["people"] = people
    return Protocol([item for items in sections.values() for item in items], assets, quick)


def rule_items(line: str, seed: int) -> list[Item]:
    """The prompts of a line of rules."""
    scenes = [LINES[line].scene(k) for k in range(SAMPLES)]
    return [Item(line, prompt, seed + k, scene=scene) for k, (prompt, scene) in enumerate(scenes)]


def held_out_items(words: dict[str, Any]) -> list[Item]:
    """A picture for each held-out one, by its fullest caption; recognised once a phrase: trials are independent."""
    asked: set[str] = set()
    items = []
    for k, row in enumerate(words["held_out"]):
        phrase = row["phrase"] if row["phrase"] in words["phrases"] and row["phrase"] not in asked else None
        asked.add(row["phrase"])
        items.append(Item("held_out", row["caption"], 5000 + k, phrase, row=k))
    return items


def spread(items: list[T], count: int) -> list[T]:
    """`count` items at even distances."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]
