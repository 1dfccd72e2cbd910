"""The scorecard as one HTML file: figures with their intervals beside the controls, and every picture drawn."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from PIL import Image

from diffusionfm.evaluate.lines import Figure
from diffusionfm.evaluate.protocol import Item
from diffusionfm.evaluate.scorecard import Scorecard

COLUMNS = {
    "model": "this model",
    "real": "real",
    "blank": "blank",
    "shuffled": "shuffled",
    "retrieved": "handed back",
}
SECTIONS = {
    "background": "Background colour",
    "ink": "One shape in one colour, transparent",
    "count": "Counting",
    "relation": "Places",
    "binding": "Two colours on two shapes",
    "held_out": "Held-out phrases",
    "taught": "Training phrases",
    "own_words": "Words of one's own",
    "unseen": "Combinations that no caption holds",
    "people": "People",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}td,th{padding:.3rem .7rem;border-bottom:1px solid #ddd;
text-align:right;vertical-align:top}td:first-child,th:first-child{text-align:left}small{color:#555}
.good{background:#e6f4e6;padding:.6rem 1rem}.bad{background:#fbe3e1;padding:.6rem 1rem}summary{cursor:pointer;
font-weight:600;padding:.4rem 0}.wall{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:132px;font-size:12px}
img{width:128px;height:128px;border:2px solid #bbb;background:repeating-conic-gradient(#d6d6d6 0 25%,#fff 0 50%)
0 0/16px 16px}.right img{border-color:#2e7d32}.wrong img{border-color:#c62828}
"""


def page(card: Scorecard) -> str:
    """The whole page; it needs no other file and no network."""
    report = card.report
    protocol, model = report["protocol"], report["model"]
    settings = ", ".join(f"{key} {model[key]:g}" for key in ("steps", "guidance", "width", "height", "shift"))
    kind = "quick " if protocol["quick"] else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Scorecard of {escape(model["name"])}</title><style>{STYLE}</style>
<h1>Scorecard of {escape(model["name"])}</h1>
<p>Weights {escape(model["fingerprint"])}; {settings}. {kind.capitalize()}protocol {protocol["version"]},
<code>{protocol["hash"][:16]}</code>, {protocol["pictures"]} pictures, first seed, none chosen.</p>
{soundness(report)}
<p>Shares in percent with their 95 % intervals. <b>Real</b>: held-out pictures, or training pictures that the judge was
not fitted to; for rules, pictures right by construction. <b>Shuffled</b>: the real ones, judged by another's prompt.
<b>Handed back</b>: a training picture for each prompt. Near-copies are looked for among
{protocol["training_pictures"]:,} training pictures.</p>
{figures_table(report["lines"])}
<h2>What people look like</h2>
<p>The phrase nearest to each picture, as the judge reads it: of phrases for people alone, then of all 500. A weak
judge of weak pictures: read it as a hint, and look below.</p>
{people_table(report["people"])}
<h2>Every picture</h2>
{"".join(wall(card, section, title) for section, title in SECTIONS.items())}
</html>
"""


def soundness(report: dict[str, Any]) -> str:
    """Whether the instrument ranks its controls as it must."""
    if report["sound"]:
        return f'<p class="good">The instrument ranks its controls as it must ({len(report["claims"])} checks).</p>'
    items = "".join(f"<li>{escape(claim)}</li>" for claim in report["complaints"])
    warning = "<b>Do not trust this scorecard:</b> it ranks controls wrongly. This does not hold:"
    return f'<div class="bad">{warning}<ul>{items}</ul></div>'


def figures_table(lines: dict[str, dict[str, Any]]) -> str:
    """Every line and control."""
    head = "".join(f"<th>{title}</th>" for title in COLUMNS.values())
    body = ""
    for line in lines.values():
        ratio = f"<br><small>{line['of_real']:.0%} of real</small>" if "of_real" in line else ""
        cells = [f"<td>{cell(line.get(name))}{ratio if name == 'model' else ''}</td>" for name in COLUMNS]
        arrow = "↓" if line["better"] == "lower" else "↑"
        body += f"<tr><td>{escape(line['title'])} {arrow}</td>{''.join(cells)}</tr>\n"
    return f"<table><tr><th>figure</th>{head}</tr>\n{body}</table>"


def cell(figure: Figure | None) -> str:
    """A figure over its interval, or a dash."""
    if figure is None:
        return "–"
    value, interval = said(figure)
    return f"{value}<br><small>{interval}</small>"


def said(figure: Figure) -> tuple[str, str]:
    """A figure and its interval in words; shares in percent."""
    if "share" in figure:
        return (
            f"{100 * figure['share']:.1f}",
            f"{100 * figure['low']:.1f}–{100 * figure['high']:.1f}, n {figure['of']}",
        )
    if "mean" in figure:
        return f"{figure['mean']:.4g}", f"{figure['low']:.4g}–{figure['high']:.4g}, n {figure['of']}"
    return f"{figure['distance']:.2f}", f"n {figure['of']}"


def people_table(table: dict[str, Figure]) -> str:
    """Prompt, how often a woman's or a man's phrase was nearest, and the nearest phrases."""

    def counts(found: dict[str, int]) -> str:
        return ", ".join(f"{escape(word)} {n}" for word, n in found.items())

    body = "".join(
        f"<tr><td>{escape(prompt)}</td><td>{cell(row['woman'])}</td><td>{cell(row['man'])}</td>"
        f"<td>{counts(row['nearest_person'])}</td><td>{counts(row['nearest'])}</td></tr>\n"
        for prompt, row in table.items()
    )
    head = (
        "<tr><th>prompt</th><th>woman</th><th>man</th><th>nearest for people</th><th>nearest of all</th></tr>"
    )
    return f"<table>{head}\n{body}</table>"


def wall(card: Scorecard, section: str, title: str) -> str:
    """A section's pictures with their prompts, bordered green or red where there is a verdict."""
    numbers = [k for k, item in enumerate(card.items) if item.section == section]
    right = [card.right[k] for k in numbers if card.right[k] is not None]
    count = f": {sum(map(bool, right))} of {len(right)}" if right else ""
    shown = "".join(tile(card.items[k], card.pictures[k], card.right[k], card.nearest[k]) for k in numbers)
    return f'<details><summary>{title}{count}</summary><div class="wall">{shown}</div></details>\n'


def tile(item: Item, picture: Image.Image, right: bool | None, nearest: str) -> str:
    """One picture, its prompt, and what the judge takes it for."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "" if right is None else ' class="right"' if right else ' class="wrong"'
    seen = "" if item.scene else f"<br><small>{escape(nearest)}</small>"
    return (
        f'<figure{kind}><img loading="lazy" src="data:image/webp;base64,{data}" alt="{escape(item.prompt)}">'
        f"<figcaption>{escape(item.prompt)}{seen}</figcaption></figure>"
    )
