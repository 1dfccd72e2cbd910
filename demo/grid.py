"""The Grid tab: two settings against each other, a picture for every pair of values, and the sheet to download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from diffusionfm import sheets
from diffusionfm.edit import start_from
from diffusionfm.images import encode_png, in_common
from diffusionfm.inputs import open_picture
from diffusionfm.serve.jobs import Request

from .adapters import Picker, place, wear
from .cards import VEIL, data_url, note, notes, veiled
from .controls import QUIET, actions, easel, tuning
from .create import roll
from .lane import REFUSED, Lane, Update, turn_of
from .request import MAX_PROMPT, MAX_SEED, file_name, parameters, small
from .shelf import DrawTab, draw_all

NO_AXIS = "none"
HINT = "The sheet appears here.", f"Two settings against each other, {sheets.MOST} pictures at most."
FIRST = {
    "prompt": "cat, dog, fox",
    "style": "flat emoji, 3D emoji, sticker",
    "background": "transparent, sky blue, gold",
    "seed": "0-3",
    "steps": "4, 8, 20",
    "guidance": "1, 2, 4, 8",
    "strength": "0.7, 0.8, 0.9, 1",
    "lora": "0, 0.5, 1",
}
"""What an axis is filled with when it is chosen."""
HELP = "Values with commas between them, or from-to:step as in 1-9:2. For the prompt, the first is replaced by each."


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    prompt: gr.Textbox
    x: gr.Dropdown
    xs: gr.Textbox
    y: gr.Dropdown
    ys: gr.Textbox
    draw: gr.Button
    cancel: gr.Button
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    negative: gr.Textbox
    adapter: Picker
    picture: gr.File
    stage: gr.HTML
    status: gr.HTML
    said: gr.HTML


def grid(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    axes = [at.x, at.xs, at.y, at.ys]
    tab.wire([at.draw.click], [at.prompt, *axes, at.seed, at.steps, at.guidance, at.negative, at.picture])
    for name, values in ((at.x, at.xs), (at.y, at.ys)):
        name.input(lambda axis: FIRST.get(axis, ""), name, values, **QUIET)


def lay_out(lane: Lane) -> Controls:
    """Place every component inside the open Blocks."""
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts = _asking()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _settings(lane)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts |= easel("grid-", HINT, "")
    return Controls(**parts)


def _asking() -> dict[str, Any]:
    axes = list(sheets.AXES)
    parts: dict[str, Any] = {
        "prompt": gr.Textbox(
            "a flat emoji of a smiling cat",
            label="Prompt",
            lines=1,
            max_lines=4,
            max_length=MAX_PROMPT,
            elem_id="grid-prompt",
        )
    }
    for name, choices, chosen in (("x", axes, "prompt"), ("y", [NO_AXIS, *axes], "guidance")):
        title = {"x": "Across", "y": "Down"}[name]
        with gr.Row(elem_classes="axis"):
            parts[name] = gr.Dropdown(
                choices, value=chosen, label=title, scale=2, min_width=110, elem_id=f"grid-{name}"
            )
            parts[f"{name}s"] = gr.Textbox(
                FIRST[chosen],
                label=f"{title}: values",
                lines=1,
                scale=3,
                min_width=120,
                max_length=MAX_PROMPT,
                elem_id=f"grid-{name}s",
            )
    gr.HTML(note(HELP))
    parts["draw"], parts["cancel"] = actions("Draw the grid", "grid-draw", "grid-cancel")
    return parts


def _settings(lane: Lane) -> dict[str, Any]:
    adapter = place(lane.pickers["grid"])
    seed = gr.Number(
        0,
        label="Seed",
        info="The same for every picture, so that they can be compared.",
        precision=0,
        minimum=0,
        maximum=MAX_SEED,
        elem_id="grid-seed",
    )
    tuned = tuning(lane, "grid-")
    picture = gr.File(
        label="A picture to set out from, for strength",
        file_types=["image"],
        type="filepath",
        height=140,
        elem_id="grid-picture",
    )
    return {"adapter": adapter, "seed": seed, **tuned, "picture": picture}


class Tab(DrawTab):
    """What the tab's components do."""

    at: Controls

    def draw(
        self,
        person: str,
        model: str | None,
        adapter: str | None,
        weight: float,
        prompt: str,
        x: str,
        xs: str,
        y: str,
        ys: str,
        seed: int | None,
        steps: int,
        guidance: float,
        negative: str | None,
        picture: str | None,
        request: gr.Request,
    ) -> Iterator[Update]:
        """The drawing: progress, then the sheet."""
        try:
            engine = self.lane.models.engine(model)
            base: dict[str, Any] = {
                "prompt": (prompt or "").strip(),
                "negative_prompt": (negative or "").strip(),
                "seed": roll() if seed is None else int(seed),
                "steps": int(steps),
                "guidance": float(guidance),
                "loras": wear(self.lane, engine, person, adapter, weight),
            }
            across = sheets.parse_axis(x, xs)
            down = None if y == NO_AXIS else sheets.parse_axis(y, ys)
            requests = _requests(sheets.plan_grid(base, across, down), picture, engine.pipe.defaults)
        except REFUSED as error:
            raise gr.Error(str(error), title="This grid cannot be drawn", duration=10) from error
        yield self.busy(f"Drawing {len(requests)} pictures.")
        for event in draw_all(engine, turn_of(request), requests):
            if not isinstance(event, list):
                yield self.progress(event, len(requests))
                continue
            facts: dict[str, Any] = {"": base["prompt"]} | {
                name: base[name] for name in ("seed", "steps", "guidance")
            }
            if base["loras"]:
                facts["lora"] = f"{base['loras'][0][0].partition('+')[0]}:{weight:g}"
            facts = {name: value for name, value in facts.items() if name not in (x, y)}
            sheet = sheets.draw_sheet([drawn.images[0] for drawn in event], across, down, facts)
            pairs = zip(requests, event, strict=True)
            said = in_common([parameters(engine.pipe.model_name, *pair)[0] for pair in pairs])
            told = f"{len(requests)} pictures, {x} across" + (f", {y} down" if down else "")
            flagged = [word for drawn in event for word in drawn.flagged]
            advice = [*dict.fromkeys(word for drawn in event for word in drawn.warnings), *veiled(flagged)]
            yield self.rest() | {
                self.at.stage: _figure(
                    encode_png(sheet, said if self.lane.metadata else None),
                    told,
                    file_name(f"grid {base['prompt']}"),
                    bool(flagged),
                ),
                self.at.status: note(told) + notes(advice, "warn"),
                self.at.said: " ".join([f"The sheet is drawn: {told}.", *advice]),
            }


def _requests(cells: list[sheets.Settings], picture: str | None, size: dict[str, Any]) -> list[Request]:
    """A request a cell; `picture` is the file to set out from, if there is one."""
    strengths = [cell.pop("strength", None) for cell in cells]
    if picture is None:
        if any(strength is not None for strength in strengths):
            raise ValueError("strength needs a picture to set out from: give one")
        return [Request(**cell) for cell in cells]
    image = open_picture(small(picture))
    return [
        Request(**cell, start=start_from(image, size["width"], size["height"], strength))
        for cell, strength in zip(cells, strengths, strict=True)
    ]


def _figure(sheet: bytes, told: str, name: str, flagged: bool) -> str:
    source = data_url(sheet)
    return (
        f'<figure class="card wide"><div class="veiled"><img class="whole" src="{source}" alt="{escape(told)}">'
        f"{VEIL if flagged else ''}</div><figcaption>"
        f'<span class="seed">{escape(told)}</span>'
        f'<a href="{source}" download="{name}.png" aria-label="Download the sheet as PNG">Download the sheet</a>'
        "</figcaption></figure>"
    )
