"""The scorecard's history: what each model's report said, kept in train/history.json, drawn in train/history.svg.

python train/history.py add report.json --label "flat emoji first" --samples 704768 --flops 3.3e15
python train/history.py plot                  # and print it as a Markdown table; --protocol HASH: not the newest
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusionfm.config import user_errors
from diffusionfm.images import write_atomic

FILE = Path(__file__).with_name("history.json")
Figure = list[float]  # value, low, high, of how many
Point = tuple[float, Figure, bool]  # samples, figure, whether in few steps
SETTINGS = ("steps", "guidance", "shift", "phrasebook")  # by which one model's figures differ
LOSS = "loss"
SHARES = {  # line of the report: its name here, its colour
    "rules.background": ("background", "#0f766e"),
    "rules.transparent": ("transparent", "#64748b"),
    "rules.ink": ("one ink", "#b45309"),
    "rules.count": ("counts", "#2563eb"),
    "rules.relation": ("places", "#7c3aed"),
    "rules.binding": ("pairs", "#db2777"),
    "recognised.taught.first": ("training phrases", "#15803d"),
    "recognised.own_words.first": ("own words", "#0891b2"),
    "recognised.held_out.first": ("held-out phrases", "#dc2626"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=FILE, help="default: train/history.json")
    commands = parser.add_subparsers(required=True)
    adding = commands.add_parser("add", help="keep a report's figures")
    adding.add_argument("report", type=Path, help="the .json file that `diffusionfm evaluate` wrote")
    adding.add_argument("--label", required=True, help="what was new about this model, in a few words")
    adding.add_argument("--samples", type=int, required=True, help="that its denoiser was trained on")
    adding.add_argument("--flops", type=float, required=True, help="of that training (ledger.json)")
    adding.set_defaults(run=lambda args: add(args.file, args.report, args.label, args.samples, args.flops))
    plotting = commands.add_parser("plot", help="draw the .svg beside the file, print the table")
    plotting.add_argument(
        "--protocol", default="", help="first letters of its hash (default: the newest entry's)"
    )
    plotting.set_defaults(run=lambda args: plot(args.file, args.protocol))
    args = parser.parse_args(argv)
    with user_errors():
        args.run(args)


# ------------------------------------------------------------------ the file


def add(file: Path, report: Path, label: str, samples: int, flops: float) -> None:
    """Append a report's figures; `ValueError` where it is no sound report, or its model is there already."""
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
        sound, complaints = told["sound"] is True, "; ".join(told["complaints"])
        protocol, model = told["protocol"], told["model"]
        entry = {
            "label": label,
            "date": told["date"],
            "version": told["version"],
            "samples": samples,
            "flops": flops,
            "model": model["fingerprint"],
            **{name: model[name] for name in (*SETTINGS, "fast", "dtype", "device", "vae_hash")},
            "protocol": protocol["hash"],
            "figures": figures(told["lines"], "model"),
        }
        about = {name: protocol[name] for name in ("version", "quick", "pictures")}
        about["real"] = figures(told["lines"], "real")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report of `diffusionfm evaluate` to keep ({error!r})") from error
    if not sound:
        raise ValueError(f"{report} is not kept: its controls rank wrongly: {complaints}")
    if samples <= 0 or not 0 < flops < float("inf"):
        raise ValueError(f"--samples and --flops are more than 0, not {samples} and {flops:g}")
    history = read(file)
    for other in history["models"]:
        if all(other.get(name) == entry[name] for name in ("model", "protocol", *SETTINGS)):
            raise ValueError(f"{file} has this model by this protocol already, as {other['label']!r}")
    history["protocols"].setdefault(protocol["hash"], about)
    history["models"].append(entry)
    write_atomic(file, text(history).encode())


def figures(lines: dict[str, Any], column: str) -> dict[str, Figure]:
    """Line -> [value, low, high, of how many] of a column of a report; a distance has no interval."""
    found: dict[str, Figure] = {}
    for name, line in lines.items():
        if figure := line.get(column):
            value = next(figure[kind] for kind in ("share", "mean", "distance") if kind in figure)
            low, high = figure.get("low", value), figure.get("high", value)
            found[name] = [*(float(f"{x:.4g}") for x in (value, low, high)), figure["of"]]
    return found


def read(file: Path) -> dict[str, Any]:
    """{"protocols": by hash, "models": entries, oldest first}."""
    if not file.is_file():
        return {"protocols": {}, "models": []}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): take it from git again") from error


def text(history: dict[str, Any]) -> str:
    """The history as JSON, a line for each protocol and each model."""
    protocols = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(about)}" for name, about in history["protocols"].items()
    )
    models = ",\n".join(f" {json.dumps(entry)}" for entry in history["models"])
    return f'{{"protocols": {{\n{protocols}\n}},\n"models": [\n{models}\n]}}\n'


def of_protocol(history: dict[str, Any], begins: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A protocol and its models by samples: that whose hash begins so, or the newest entry's. Never two of them."""
    if not history["models"]:
        raise ValueError("nothing to plot yet: add a report first")
    names = [
        name for name in history["protocols"] if name.startswith(begins or history["models"][-1]["protocol"])
    ]
    if len(names) != 1:
        known = ", ".join(name[:12] for name in history["protocols"])
        raise ValueError(
            f"{len(names)} protocols begin with {begins!r}, and scores compare within one alone: {known}"
        )
    models = [entry for entry in history["models"] if entry["protocol"] == names[0]]
    return history["protocols"][names[0]], sorted(models, key=lambda entry: entry["samples"])


def plot(file: Path, begins: str = "") -> None:
    """Write the .svg beside the file, and print the table."""
    protocol, models = of_protocol(read(file), begins)
    write_atomic(file.with_suffix(".svg"), drawing(protocol, models).encode())
    print(table(protocol, models))


# ------------------------------------------------------------------ the table


def table(protocol: dict[str, Any], models: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a model, and one for real pictures."""
    lines = {LOSS: "loss"} | {line: name for line, (name, _) in SHARES.items()}
    rows = [["model", "samples", "FLOPs", *lines.values()], ["---"] * (3 + len(lines))]
    for entry in models:
        label = escape(entry["label"]).replace("|", "&#124;")
        about = [label, f"{entry['samples']:,}", f"{entry['flops']:.2g}".replace("e+", "e")]
        rows.append([*about, *(said(line, entry["figures"]) for line in lines)])
    rows.append(["real pictures", "", "", *(said(line, protocol["real"]) for line in lines)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def said(line: str, found: dict[str, Figure]) -> str:
    """A figure with its interval, shares in percent, to a tenth where that is not whole; a dash for none."""
    if line not in found:
        return "–"
    value, low, high, _ = found[line]
    if line == LOSS:
        return f"{value:.3f} ({low:.2f}–{high:.2f})"
    share = f"{100 * value:.1f}".removesuffix(".0")
    return f"{share} ({100 * low:.0f}–{100 * high:.0f})"


# ------------------------------------------------------------------ the drawing


@dataclass
class Panel:
    """A chart's place in the drawing and the numbers at its edges."""

    left: float
    width: float
    most: float  # samples at the right edge
    low: float
    high: float
    top: float = 40
    height: float = 300

    def x(self, samples: float) -> float:
        return self.left + self.width * samples / self.most

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / (self.high - self.low)

    def frame(self, title: str, shares: bool) -> str:
        """Title, grid and numbers."""
        parts = [f'<text x="{self.left}" y="22" font-weight="600">{escape(title)}</text>']
        for k in range(6):
            value = self.low + (self.high - self.low) * k / 5
            y, number = self.y(value), f"{value:.0%}" if shares else f"{value:.2f}"
            parts.append(f'<path d="M{self.left} {y:.1f}h{self.width}" stroke="#e2e8f0"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
        for k in range(5):
            samples, y = self.most * k / 4, self.top + self.height + 18
            number = f"{samples / 1e6:g} M" if k else "0"
            parts.append(f'<text x="{self.x(samples):.1f}" y="{y}" text-anchor="middle">{number}</text>')
        return "".join(parts)

    def series(
        self, points: Sequence[Point], color: str, aside: float = 0, joins: Sequence[bool] = ()
    ) -> str:
        """Dots with their intervals, each joined to the next but where `joins` denies it; few steps are lone rings."""
        places = [(self.x(samples) + aside, figure, few) for samples, figure, few in points]
        places.sort(key=lambda place: not place[2])  # a dot within a ring is seen
        parts = [
            f'<path d="M{x:.1f} {self.y(figure[1]):.1f}V{self.y(figure[2]):.1f}" stroke="{color}" opacity=".5"/>'
            f'<circle cx="{x:.1f}" cy="{self.y(figure[0]):.1f}" r="{5 if few else 3}" stroke="{color}"'
            f' fill="{"#fff" if few else color}"/>'
            for x, figure, few in places
        ]
        lines: list[list[str]] = [[]]
        dots = [f"{x:.1f},{self.y(figure[0]):.1f}" for x, figure, few in places if not few]
        for k, dot in enumerate(dots):
            if k and joins and not joins[k - 1]:
                lines.append([])
            lines[-1].append(dot)
        drawn = "".join(
            f'<polyline points="{" ".join(line)}" fill="none" stroke="{color}"/>' for line in lines
        )
        return drawn + "".join(parts)


def alike(models: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each model's loss compares with the next one's: in latents of one and the same autoencoder."""
    hashes = [entry.get("vae_hash") for entry in models]
    return [one is not None and one == other for one, other in pairwise(hashes)]


def drawing(protocol: dict[str, Any], models: Sequence[dict[str, Any]]) -> str:
    """An SVG: held-out loss, and shares, against samples."""

    def points(line: str) -> list[Point]:
        return [
            (entry["samples"], entry["figures"][line], entry["fast"])
            for entry in models
            if line in entry["figures"]
        ]

    most = -(-max(entry["samples"] for entry in models) // 200_000) * 200_000
    losses = [point for point in points(LOSS) if not point[2]]  # few steps learned other times
    joins = alike([entry for entry in models if LOSS in entry["figures"] and not entry["fast"]])
    ends = [edge for _, figure, _ in losses for edge in figure[1:3]] or [0, 1]
    left = Panel(50, 230, most, math.floor(20 * min(ends)) / 20, math.ceil(20 * max(ends)) / 20)
    right = Panel(350, 330, most, 0, 1)
    kind = "Quick" if protocol["quick"] else "Full"
    title = f"{kind} protocol {protocol['version']}, {protocol['pictures']:,} pictures, 95 % intervals"
    parts = [left.frame("Held-out velocity loss", False), left.series(losses, "#334155", joins=joins)]
    parts.append(right.frame("Shares of pictures", True))
    newest = {line: points(line)[-1][1][0] for line in SHARES if points(line)}
    for k, line in enumerate(sorted(newest, key=lambda line: -newest[line])):
        name, color = SHARES[line]
        y = right.top + 8 + 24 * k
        parts.append(right.series(points(line), color, aside=3 * (k - len(newest) / 2)))
        parts.append(f'<circle cx="700" cy="{y}" r="3" fill="{color}"/>')
        parts.append(f'<text x="712" y="{y + 4}">{escape(name)}</text>')
    few = " Rings: drawn in fewer steps." if any(entry["fast"] for entry in models) else ""
    parts.append(f'<text x="50" y="384">{title}, by training samples.{few}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 396" role="img" font-family="sans-serif"'
        f' font-size="12" fill="#1e293b"><title>The scorecard by training samples. {title}</title>'
        f'<rect width="920" height="396" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
