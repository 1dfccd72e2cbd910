"""What the instrument says of pictures whose worth is known, and whether it ranks them as it must.

real: held-out pictures, or training pictures kept from the judge's fit; for the rules, pictures right by construction.
blank: fully transparent pictures. shuffled: the real pictures, each judged by another's prompt.
counterfactual: for the rules, pictures wrong by construction in the one thing that the rule is about.
retrieved: a training picture handed back for each phrase, which only memory can tell from a perfect model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from diffusionfm.evaluate.assets import Assets
from diffusionfm.evaluate.drawn import counterfactual, draw_scene
from diffusionfm.evaluate.judge import Judge, Views, joined
from diffusionfm.evaluate.lines import Figure, copies, distance, recognition, rule_figures, unique
from diffusionfm.evaluate.memory import Index
from diffusionfm.evaluate.protocol import Item, Protocol
from diffusionfm.evaluate.rules import LINES

Column = dict[str, Figure]
RECOGNISED = ("held_out", "taught", "own_words")
COPIED = ("unseen", "held_out", "taught")
SHIFT = 0.37  # of a list: how far prompts are moved to shuffle them


@dataclass
class Bench:
    """A protocol with everything its pictures are judged by. real: the held-out pictures it uses, by their row."""

    protocol: Protocol
    assets: Assets

    def __post_init__(self) -> None:
        arrays, self.thresholds = self.assets.arrays, self.assets.words["thresholds"]
        self.judge = Judge(arrays, self.assets.words["phrases"])
        pictures = self.assets.held_out()
        rows = (self.protocol.items[k].row for k in self.protocol.numbers("held_out"))
        self.real = {row: pictures[row] for row in rows if row is not None}
        self.indices = {
            name: Index(arrays[f"index.{name}.codes"], arrays[f"index.{name}.centres"])
            for name in ("likeness", "pixels")
        }
        self.real_rows = list(self.real)
        self.kept, self.copied = (self.stored(name) for name in ("kept", "copied"))

    @cached_property
    def real_views(self) -> Views:
        """Views of the held-out pictures, in the order of real_rows."""
        return self.judge.see(list(self.real.values()))

    @cached_property
    def blank(self) -> Views:
        """The view of one blank picture."""
        return self.judge.see([Image.new("RGBA", (128, 128))])

    def stored(self, name: str) -> Views:
        """Views of training pictures that the assets hold."""
        parts = ("meaning", "likeness", "pixels")
        return Views(*(self.assets.arrays[f"{name}.{part}"].astype(np.float32) for part in parts))

    def column(self, views: dict[str, Views], items: dict[str, list[Item]]) -> Column:
        """Every figure, but those of the rules, that sections of pictures give.

        Where there are no unseen combinations, copies are counted once, among the held-out, and stand for all.
        """
        found: Column = {}
        for section in RECOGNISED:
            asked = [k for k, item in enumerate(items[section]) if item.truth]
            truths = [item.truth or "" for item in items[section] if item.truth]
            figures = recognition(self.judge, views[section].take(asked), truths)
            found |= {f"recognised.{section}.{name}": figure for name, figure in figures.items()}
        for section in COPIED:
            seen = views[section if "unseen" in views else "held_out"]
            figures = copies(seen, self.indices, self.thresholds)
            found |= {f"copies.{section}.{name}": figure for name, figure in figures.items()}
        found["unique"] = unique(views["held_out"], self.thresholds)
        if figure := distance(views["held_out"].likeness, self.assets.arrays["reference"]):
            found["likeness"] = figure
        return found


def control_columns(bench: Bench) -> dict[str, Column]:
    """Control -> its figures."""
    items = {section: once(bench, section) for section in RECOGNISED}
    rows = {section: [item.row or 0 for item in found] for section, found in items.items()}
    real = {section: bench.kept.take(rows[section]) for section in ("taught", "own_words")}
    real["held_out"] = bench.real_views.take([bench.real_rows.index(row) for row in rows["held_out"]])
    blank = {section: bench.blank.take([0] * len(found)) for section, found in items.items()}
    asked = items | {"held_out": [item for item in items["held_out"] if item.truth]}
    shuffled = {section: views.take(moved(len(views))) for section, views in real.items()}
    columns = {
        "real": bench.column(real, items),
        "blank": bench.column(blank, items),
        "shuffled": bench.column(shuffled, items),
        "retrieved": bench.column(handed_back(bench, asked), asked),
        "counterfactual": {},
    }
    for name in [name for name in columns["shuffled"] if not name.startswith("recognised.")]:
        del columns["shuffled"][name]  # order does not matter to these
    for name, figures in rule_columns(bench.protocol).items():
        columns[name] |= figures
    return columns


def once(bench: Bench, section: str) -> list[Item]:
    """A section's items, one for each real picture behind them."""
    items = [bench.protocol.items[k] for k in bench.protocol.numbers(section)]
    return list({item.row: item for item in reversed(items)}.values())[::-1]


def moved(count: int) -> list[int]:
    """Numbers 0 to count, each in another's place."""
    step = max(1, round(SHIFT * count))
    return [(k + step) % count for k in range(count)]


def handed_back(bench: Bench, items: dict[str, list[Item]]) -> dict[str, Views]:
    """A training picture for each item, none twice in a section: of its own phrase, or near a held-out one's meaning.

    Every held-out item has a truth. For unseen combinations, whose meaning no phrase tells, all stored copies.
    """
    taught = bench.judge.only(bench.assets.words["taught"]).places
    asked = bench.judge.only([item.truth or "" for item in items["held_out"]]).places
    _, nearest = linear_sum_assignment(asked @ np.concatenate([taught, taught]).T, maximize=True)
    found = {
        section: bench.copied.take([item.row or 0 for item in items[section]])
        for section in ("taught", "own_words")
    }
    return found | {"unseen": bench.copied, "held_out": joined(bench.copied, bench.kept).take(nearest)}


def rule_columns(protocol: Protocol) -> dict[str, Column]:
    """The rules on pictures right or wrong by construction, on blank ones, and on those of another prompt."""
    found: dict[str, Column] = {"real": {}, "blank": {}, "shuffled": {}, "counterfactual": {}}
    for line in LINES:
        items = [protocol.items[k] for k in protocol.numbers(line)]
        scenes = [item.scene for item in items if item.scene]
        right = [draw_scene(scene, outline=k % 2 == 1) for k, scene in enumerate(scenes)]
        sets: dict[str, list[Any]] = {
            "real": right,
            "blank": [Image.new("RGBA", (128, 128))] * len(items),
            "shuffled": [right[k] for k in moved(len(right))],
        }
        for name, pictures in sets.items():
            for rule, figure in rule_figures(items, pictures).items():
                if (name, rule) != ("shuffled", "transparent"):  # every prompt of that line asks for the same
                    found[name][f"rules.{rule}"] = figure
        for rule in LINES[line].rules:
            wrong = [
                draw_scene(counterfactual(rule, scene, k), outline=k % 2 == 1)
                for k, scene in enumerate(scenes)
            ]
            found["counterfactual"][f"rules.{rule}"] = rule_figures(items, wrong)[rule]
    return found


def claims(columns: dict[str, Column]) -> list[dict[str, Any]]:
    """What a sound instrument says of the controls, and whether this one does."""
    found: list[tuple[str, bool]] = []
    for name, real in columns["real"].items():
        blank, shuffled, handed = (columns[c].get(name, {}) for c in ("blank", "shuffled", "retrieved"))
        if name.startswith("rules."):
            found.append((f"{name}: pictures right by construction keep the rule", real["share"] >= 0.95))
            found.append((f"{name}: blank pictures break it", blank["share"] == 0))
            wrong = columns["counterfactual"][name]["share"]
            found.append((f"{name}: pictures with that one thing wrong break it", wrong == 0))
            if shuffled:
                found.append((f"{name}: pictures of other prompts mostly break it", shuffled["share"] <= 0.5))
        elif name.startswith("recognised."):
            found.append((f"{name}: real pictures are above blank ones", real["low"] > blank["share"]))
            found.append((f"{name}: real pictures are above shuffled ones", real["low"] > shuffled["share"]))
        elif name.startswith("copies.unseen"):
            found.append((f"{name}: pictures handed back from training are copies", handed["share"] >= 0.9))
            found.append((f"{name}: few held-out pictures are copies", real["share"] <= 0.05))
        elif name == "unique":
            found.append((f"{name}: blank pictures are all alike", blank["share"] == 0))
            found.append((f"{name}: real pictures differ", real["share"] >= 0.8))
        elif name == "likeness":
            others = min(blank["distance"], handed["distance"])
            found.append((f"{name}: the two halves of real pictures are nearest", real["distance"] < others))
        elif name == "fid":
            found.append(
                (f"{name}: blank pictures are farther than real ones", blank["distance"] > real["distance"])
            )
    return [{"claim": claim, "holds": bool(holds)} for claim, holds in found]
