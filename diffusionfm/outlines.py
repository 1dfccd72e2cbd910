"""Outlines of plain shapes: what compositions draw and what the scorecard's rules compare with."""

from __future__ import annotations

import math

OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "circle": [(math.cos(k * math.tau / 48), math.sin(k * math.tau / 48)) for k in range(48)],
    "star": [
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k in range(10)
        for r in [(1, 0.45)[k % 2]]
    ],
    "heart": [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) + 2.5) / 14.5,
        )
        for a in (k * math.tau / 60 for k in range(60))
    ],
}
"""Shape word -> corners of its outline, x to the right and y down, in [-1, 1]."""
