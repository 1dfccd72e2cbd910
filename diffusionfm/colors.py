"""The colour words the model knows and their exact values: one table for captions, checks and studio."""

from __future__ import annotations

COLORS: dict[str, str] = {
    "red": "#e53935",
    "orange": "#fb8c00",
    "yellow": "#fdd835",
    "green": "#43a047",
    "teal": "#00897b",
    "blue": "#1e88e5",
    "navy": "#1a237e",
    "purple": "#8e24aa",
    "pink": "#f06292",
    "brown": "#795548",
    "beige": "#f0e2c8",
    "peach": "#ffccab",
    "mint": "#b2dfc4",
    "sky blue": "#90caf9",
    "lavender": "#cbb9ec",
    "gold": "#d4a017",
    "gray": "#9e9e9e",
    "black": "#111111",
    "white": "#ffffff",
}
"""Colour word -> sRGB value. Drawn backgrounds and inks use exactly these values."""
PALE = {"white", "beige", "peach", "mint", "lavender", "sky blue"}
"""Colours for grounds alone: a drawing in one of them would hardly be seen."""
INKS = tuple(word for word in COLORS if word not in PALE)
"""Colours a drawing of one colour may have."""


def rgb(word: str) -> tuple[int, int, int]:
    """The 8-bit sRGB triple of a colour word; `ValueError` lists the known words."""
    if word not in COLORS:
        raise ValueError(f"unknown colour {word!r}: use one of {', '.join(COLORS)}")
    value = COLORS[word]
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def nearest(color: tuple[float, float, float]) -> str:
    """The colour word closest to an 8-bit sRGB triple, by the "redmean" distance."""

    def distance(word: str) -> float:
        r, g, b = rgb(word)
        mean = (r + color[0]) / 2
        dr, dg, db = r - color[0], g - color[1], b - color[2]
        return (2 + mean / 256) * dr**2 + 4 * dg**2 + (2 + (255 - mean) / 256) * db**2

    return min(COLORS, key=distance)
