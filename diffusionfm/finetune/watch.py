"""A look at a run from outside, while it trains or afterwards: how far, the losses, the sheets, the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusionfm.checks import read_json
from diffusionfm.finetune.report import chart, outcome, read_metrics, verdict
from diffusionfm.finetune.settings import RECORD


@dataclass(frozen=True)
class Look:
    """What a run folder shows. step: the last one taken. seconds: of training so far. chart: an SVG, or "".

    sheets: the model beside the adapted one, by step. words: the verdict, once the run has ended by itself."""

    step: int = 0
    seconds: float = 0.0
    best: int = 0
    chart: str = ""
    sheets: dict[int, Path] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def look(out: Path) -> Look:
    """What there is to see of the run in `out`; before it has begun, nothing."""
    sheets = {int(path.stem): path for path in sorted((out / "samples").glob("[0-9]*.png"))}
    record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    lines = read_metrics(out)
    if not lines:
        return Look(sheets=sheets)
    last, held_out = lines[-1], bool(record.get("held_out"))
    best = int(next((line["best_step"] for line in reversed(lines) if "best_step" in line), 0))
    words = []
    if ended := record.get("ended"):
        words = [*verdict(outcome(out), held_out), f"It {ended['why']}."]
    drawn = chart(lines, held_out, best)
    return Look(int(last["step"]), float(last.get("seconds", 0)), best, drawn, sheets, words)
