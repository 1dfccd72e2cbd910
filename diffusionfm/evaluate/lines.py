"""The figures of the scorecard, each computed alike for a model's pictures and for the controls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusionfm.evaluate.judge import Judge, Views
from diffusionfm.evaluate.memory import Index, unlike_each_other
from diffusionfm.evaluate.protocol import Item
from diffusionfm.evaluate.rules import verdicts
from diffusionfm.evaluate.statistics import frechet, share_of

Figure = dict[str, Any]
KINDS = {"likeness": "features", "pixels": "pixels"}  # of a distance to training pictures
ENOUGH = 200  # pictures for a Fréchet distance
WOMAN, MAN = re.compile(r"\b(woman|women|girl)\b"), re.compile(r"\b(man|men|boy)\b")


def rule_figures(items: Sequence[Item], pictures: Sequence[Image.Image]) -> dict[str, Figure]:
    """Rule -> share of the pictures that keep it."""
    kept: dict[str, list[bool]] = {}
    for item, picture in zip(items, pictures, strict=True):
        assert item.scene is not None
        for rule, verdict in verdicts(item.section, item.scene, picture).items():
            kept.setdefault(rule, []).append(verdict)
    return {rule: share_of(sum(found), len(found)) for rule, found in kept.items()}


def recognition(judge: Judge, views: Views, truths: Sequence[str]) -> dict[str, Figure]:
    """Share whose true phrase is the nearest of all, and among the five nearest."""
    ranks = judge.ranks(views, truths)
    return {
        "first": share_of(int((ranks == 0).sum()), len(ranks)),
        "five": share_of(int((ranks < 5).sum()), len(ranks)),
    }


def copies(views: Views, indices: dict[str, Index], thresholds: dict[str, float]) -> dict[str, Figure]:
    """Share nearer to a training picture than the closest 1 % of held-out pictures are, by features and by pixels."""
    kinds = [near["by"] for near in near_copies(views, indices, thresholds)]
    return {kind: share_of(kinds.count(kind), len(views)) for kind in KINDS.values()}


def near_copies(
    views: Views, indices: dict[str, Index], thresholds: dict[str, float]
) -> list[dict[str, Any]]:
    """Each near-copy: its number here, the training picture's in the index, their distance and the limit of it."""
    found = []
    for name, kind in KINDS.items():
        limit = thresholds[name]
        away, numbers = indices[name].nearest(getattr(views, name))
        found += [
            {
                "picture": int(k),
                "by": kind,
                "training_picture": int(numbers[k]),
                "distance": float(away[k]),
                "limit": limit,
            }
            for k in np.flatnonzero(away < limit)
        ]
    return found


def unique(views: Views, thresholds: dict[str, float]) -> Figure:
    """Share with no near-copy of itself among the others."""
    alone = unlike_each_other(views.likeness, thresholds["likeness"])
    return share_of(int(alone.sum()), len(alone))


def distance(features: np.ndarray, reference: np.ndarray) -> Figure | None:
    """Fréchet distance of pictures to other, real ones by their features; None for too few pictures to tell."""
    if len(features) < ENOUGH:
        return None
    return {"distance": frechet(features, reference), "of": len(features)}


def people(judge: Judge, views: Views, prompts: Sequence[str], words: Sequence[str]) -> dict[str, Figure]:
    """Prompt -> what its pictures are nearest to: of all phrases, of the phrases for people, and by gender in these."""
    table: dict[str, Figure] = {}
    everything = judge.nearest(views)
    persons = judge.only(words).nearest(views)
    for prompt in dict.fromkeys(prompts):
        rows = [k for k, other in enumerate(prompts) if other == prompt]
        nearest = [persons[k] for k in rows]
        women, men = (sum(bool(word.search(p)) for p in nearest) for word in (WOMAN, MAN))
        table[prompt] = {
            "pictures": len(rows),
            "nearest": dict(Counter(everything[k] for k in rows).most_common(6)),
            "nearest_person": dict(Counter(nearest).most_common(6)),
            "woman": share_of(women, len(rows)),
            "man": share_of(men, len(rows)),
        }
    return table
