"""What came of a run: its numbers, a verdict in plain words, and report.html, one file with all in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from diffusionfm.checkpoint import writing
from diffusionfm.config import as_dict
from diffusionfm.data.preflight import Preflight
from diffusionfm.finetune.settings import SHEET, FinetuneConfig
from diffusionfm.images import write_atomic

REPORT = "report.html"
LITTLE, MUCH = 0.05, 0.20  # rise of the loss on the model's own pictures that counts as forgetting
HARDLY = 0.005  # fall of the validation loss that counts as none
RISE = 0.01  # of the validation loss since its best that counts as overfitting
SHEETS = 6  # beside the best step's, spread over the run
Curve = list[tuple[float, float]]
COLORS = {
    "held out": "#2563eb",
    "trained on": "#16a34a",
    "the model's own": "#d97706",
    "each step": "#cbd5e1",
}


@dataclass(frozen=True)
class Outcome:
    """The losses at the best step and at the last, and the base model's."""

    step: int  # the best
    last_step: int
    best: dict[str, float]
    last: dict[str, float]

    @property
    def learned(self) -> float:
        """By which share the validation loss fell below the base model's."""
        return 1 - self.best["validation_loss"] / self.best["base_validation_loss"]

    @property
    def overfitted(self) -> bool:
        """Whether the validation loss rose after its best while the loss on the pictures trained on fell."""
        rose = self.last["validation_loss"] > self.best["validation_loss"] * (1 + RISE)
        return rose and self.last["seen_loss"] < self.best["seen_loss"]

    @property
    def forgot(self) -> float:
        """By which share the loss on the model's own pictures rose above the base model's."""
        return self.best["own_loss"] / self.best["base_own_loss"] - 1

    def numbers(self) -> dict[str, Any]:
        """All of it, for JSON."""
        shares = {"learned": self.learned, "overfitted": self.overfitted, "forgot": self.forgot}
        names = [key for key in self.best if key.endswith("_loss")]
        return {"best_step": self.step, **shares, **{name: self.best[name] for name in names}}


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, which may still be growing."""
    file = out / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def outcome(out: Path) -> Outcome:
    """What the validations of a run found."""
    lines = [line for line in read_metrics(out) if "validation_loss" in line]
    step = lines[-1]["best_step"]
    best = next(line for line in lines if line["step"] == step)
    return Outcome(int(step), lines[-1]["step"], best, lines[-1])


def verdict(found: Outcome, held_out: bool) -> list[str]:
    """Three sentences or so: whether it learned, by heart or not, and what it forgot."""
    return [_learned(found, held_out), _by_heart(found, held_out), _forgot(found.forgot)]


def _learned(found: Outcome, held_out: bool) -> str:
    what = "pictures it had not seen" if held_out else "the pictures it was trained on"
    base, best = found.best["base_validation_loss"], found.best["validation_loss"]
    if found.learned >= HARDLY:
        return (
            f"It learned: the loss on {what} fell by {found.learned:.1%}, from {base:.4f} to {best:.4f} at step "
            f"{found.step}, whose weights are kept."
        )
    degree = "It hardly learned" if found.learned >= 0 else "It did not learn"
    return (
        f"{degree}: the loss on {what} is {best:.4f} at step {found.step}, the model's own {base:.4f}. Look at the "
        "captions, or take more steps or another learning rate."
    )


def _by_heart(found: Outcome, held_out: bool) -> str:
    if not held_out:
        return "Whether it learned them by heart cannot be told: of 10 pictures or more some are held out."
    if not found.overfitted:
        return "It did not learn the pictures by heart."
    return (
        f"After step {found.step} it began to learn the pictures by heart: their loss went on falling, that on "
        f"pictures it had not seen rose to {found.last['validation_loss']:.4f}. More pictures help, or fewer steps."
    )


def _forgot(share: float) -> str:
    loss = f"{share:+.1%} loss on pictures of its own"
    if share < LITTLE:
        return f"It still knows what it could draw before ({loss})."
    return (
        f"It forgot {'much' if share > MUCH else 'some'} of what it could draw before ({loss}): use it at a lower "
        "scale, or train again with prior pictures (--prior 1) or fewer steps."
    )


def write_report(
    out: Path, cfg: FinetuneConfig, preflight: Preflight, found: Outcome, why: str, held_out: bool
) -> None:
    """Write report.html: verdict, sheets, curves, settings and pictures, nothing loaded from elsewhere."""
    sheets = {int(path.stem): path for path in sorted((out / "samples").glob("*.png"))}
    others = [step for step in sheets if step != found.step]
    spread = sorted({k * (len(others) - 1) // (SHEETS - 1) for k in range(SHEETS)}) if others else []
    order = [found.step, *(others[k] for k in spread)]
    words = [*verdict(found, held_out), f"It {why}."]
    body = [
        f"<h1>{escape(out.name)}</h1>",
        *(f"<p class=verdict>{escape(line)}</p>" for line in words),
        "<h2>Model beside adapted</h2><p>Each pair is one prompt and one seed.</p>",
        *(_figure(sheets[n], f"Step {n}" + (", the one kept" if n == found.step else "")) for n in order),
        "<h2>Losses</h2>",
        chart(read_metrics(out), held_out, found.step),
        "<p>Loss by step; the dashed line is the step that is kept.</p>",
        "<h2>Pictures</h2>",
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in preflight.summary())}</ul>",
        _faults(preflight.faults()),
        _figure(out / SHEET, "The first of them, with their captions"),
        "<h2>Settings</h2>",
        _table(_flat(as_dict(cfg))),
    ]
    page = _PAGE.format(title=escape(f"Fine-tuning: {out.name}"), body="\n".join(body))
    with writing(out / REPORT):
        write_atomic(out / REPORT, page.encode("utf-8", "replace"))


def _curves(lines: Sequence[dict[str, Any]], held_out: bool) -> dict[str, Curve]:
    """What the chart shows, by name."""
    each = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    names = {"validation": "held out", "seen": "trained on", "own": "the model's own"}
    curves: dict[str, Curve] = {"each step": _smooth(each)}
    for key, name in names.items():
        if key == "validation" and not held_out:
            continue
        points = [(line["step"], line[f"{key}_loss"]) for line in lines if f"{key}_loss" in line]
        base = next((line[f"base_{key}_loss"] for line in lines if f"base_{key}_loss" in line), None)
        curves[name] = ([] if base is None else [(0, base)]) + points
    return curves


def _smooth(points: Curve, most: int = 200) -> Curve:
    """Means of neighbours, so that at most `most` points are left."""
    width = -(-len(points) // most) or 1
    groups = [points[k : k + width] for k in range(0, len(points), width)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def chart(lines: Sequence[dict[str, Any]], held_out: bool, best: int) -> str:
    """The losses of metrics.jsonl as an inline SVG with axes, a legend, and a mark at the best step."""
    curves = _curves(lines, held_out)
    width, height, left, foot = 720, 300, 52, 28
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    most = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1
    at = lambda x, y: (  # noqa: E731
        left + (width - left - 8) * x / most,
        8 + (height - foot - 16) * (high - y) / span,
    )
    parts = [f'<svg viewBox="0 0 {width} {height + 24}" role="img" aria-label="Losses by step">']
    for k in range(5):
        y = low + span * k / 4
        line = at(0, y)[1]
        parts.append(f'<path d="M{left} {line:.1f}H{width}" stroke="#8888" stroke-width=".5"/>')
        parts.append(f'<text x="{left - 6}" y="{line + 4:.1f}" text-anchor="end">{y:.3f}</text>')
    for k in range(5):
        x = at(most * k / 4, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="middle">{most * k / 4:.0f}</text>')
    kept = at(best, low)[0]
    parts.append(f'<path d="M{kept:.1f} 8V{height - foot}" stroke="#94a3b8" stroke-dasharray="4 4"/>')
    for k, (name, curve) in enumerate(curves.items()):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in curve))
        if path:
            parts.append(f'<path d="M{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        x = left + 160 * k
        parts.append(f'<rect x="{x}" y="{height + 8}" width="12" height="4" fill="{COLORS[name]}"/>')
        parts.append(f'<text x="{x + 18}" y="{height + 14}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _figure(file: Path, caption: str) -> str:
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _faults(lines: Sequence[str]) -> str:
    if not lines:
        return "<p>Nothing was left out.</p>"
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} remarks on single files</summary><ul>{items}</ul></details>"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
.verdict {{ font-size: 1.1rem }}
figure {{ margin: 1rem 0 }} img {{ max-width: 100%; border: 1px solid #e5e7eb }} figcaption {{ color: #6b7280 }}
svg {{ max-width: 100%; font-size: 12px; fill: #374151 }}
table {{ border-collapse: collapse; font-size: 14px }} th {{ text-align: left; padding-right: 2rem; font-weight: 500 }}
td {{ overflow-wrap: anywhere }}
</style></head><body>
{body}
</body></html>
"""
