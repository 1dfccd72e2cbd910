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
    "counterfactual": "one thing wrong",
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
    "unseen": "Unseen combinations",
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
    distances = "" if not protocol["quick"] else " A quick run has too few pictures for a Fréchet distance."
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Scorecard of {escape(model["name"])}</title><style>{STYLE}</style>
<h1>Scorecard of {escape(model["name"])}</h1>
{drawn_with(report)}
{soundness(report)}
<p>Shares in percent with their 95 % intervals. <b>Real</b>: held-out pictures, or training pictures that the judge was
not fitted to; for rules, pictures right by construction. <b>Shuffled</b>: the real ones, judged by another's prompt.
<b>One thing wrong</b>: pictures that break the rule by construction, and nothing else. <b>Handed back</b>: a training
picture for each phrase.{distances}</p>
<p>Counts are of pieces, whatever they are; places are of the two colours, whatever their shapes.</p>
{repeats(card.items)}
{figures_table(report["lines"])}
<h2>Near-copies</h2>
<p>They are looked for among {protocol["training_pictures"]:,} training pictures without a ground. Compositions and
pictures on a coloured ground are not in that index.</p>
{copies_table(report["copies"])}
<h2>What people look like</h2>
<p>The phrase nearest to each picture, as the judge reads it: of phrases for people alone, then of all 500. A weak
judge of weak pictures: read it as a hint, and look below. For a scientist the choice is forced: among
the phrases are a man scientist and a woman scientist, and none of no gender.</p>
{people_table(report["people"])}
<h2>Every picture</h2>
{"".join(wall(card, section, title) for section, title in SECTIONS.items())}
</html>
"""


def drawn_with(report: dict[str, Any]) -> str:
    """Which model drew, how, when, and by which protocol."""
    protocol, model = report["protocol"], report["model"]
    settings = ", ".join(f"{key} {model[key]:g}" for key in ("steps", "guidance", "width", "height", "shift"))
    adapter = ", with its few-step adapter" if model["fast"] else ""
    kind = "Quick protocol" if protocol["quick"] else "Protocol"
    book = f", phrasebook {escape(model['phrasebook'])}" if model["phrasebook"] else ""
    read = (
        f" {len(report['read_as'])} different prompts were drawn as phrases of the phrasebook."
        if book
        else ""
    )
    return (
        f"<p>Weights {escape(model['fingerprint'])}, autoencoder {escape(model['vae_hash'])},"
        f" {model['parameters']:,} parameters; the denoiser in {escape(model['dtype'])} on {escape(model['device'])}"
        f"{adapter}; {settings}{book}. Drawn on {report['date']} with diffusionfm {escape(report['version'])}.<br>"
        f"{kind} {protocol['version']}, <code>{protocol['hash'][:16]}</code>, {protocol['pictures']} pictures,"
        f" first seed, none chosen.{read}</p>"
    )


def soundness(report: dict[str, Any]) -> str:
    """Whether the instrument ranks its controls as it must."""
    if report["sound"]:
        return f'<p class="good">The instrument ranks its controls as it must ({len(report["claims"])} checks).</p>'
    items = "".join(f"<li>{escape(claim)}</li>" for claim in report["complaints"])
    warning = "<b>Do not trust this scorecard:</b> it ranks controls wrongly. This does not hold:"
    return f'<div class="bad">{warning}<ul>{items}</ul></div>'


def repeats(items: list[Item]) -> str:
    """What the intervals of sections whose prompts repeat are of."""
    told = []
    for section, title in SECTIONS.items():
        prompts = [item.prompt for item in items if item.section == section]
        if len({*prompts}) < len(prompts):
            told.append(f"{title}: {len({*prompts})} prompts in {len(prompts)} pictures")
    words = "Intervals cover other seeds of prompts that are drawn more than once, not other prompts"
    return f"<p>{words}. {'; '.join(told)}.</p>" if told else ""


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


def copies_table(rows: list[dict[str, Any]]) -> str:
    """The model's near-copies, with the training picture behind each."""
    if not rows:
        return "<p>None was found.</p>"
    body = "".join(
        f"<tr><td>{SECTIONS[row['section']]}: {escape(row['prompt'])}</td><td>{row['seed']}</td><td>{row['by']}</td>"
        f"<td>{row['training_picture']}</td><td>{row['distance']:.3g}</td><td>{row['limit']:.3g}</td></tr>\n"
        for row in rows
    )
    head = "".join(
        f"<th>{title}</th>"
        for title in (
            "drawn for",
            "seed",
            "near by",
            "training picture, its row in the index",
            "distance",
            "limit",
        )
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


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
    shown = "".join(
        tile(card.items[k], card.pictures[k], card.right[k], card.nearest[k], card.read[k]) for k in numbers
    )
    return f'<details><summary>{title}{count}</summary><div class="wall">{shown}</div></details>\n'


def tile(item: Item, picture: Image.Image, right: bool | None, nearest: str, read: str) -> str:
    """One picture, its prompt, what that was read as where it was otherwise, and what the judge takes it for."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "" if right is None else ' class="right"' if right else ' class="wrong"'
    seen = "" if item.scene else f"<br><small>{escape(nearest)}</small>"
    meant = f"<br><i>drawn as {escape(read)}</i>" if read else ""
    return (
        f'<figure{kind}><img loading="lazy" src="data:image/webp;base64,{data}" alt="{escape(item.prompt)}">'
        f"<figcaption>{escape(item.prompt)}{meant}{seen}</figcaption></figure>"
    )
