"""The Grid tab: two settings against each other, a picture for every pair of values, and the sheet to download."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from diffusionfm import sheets
from diffusionfm.edit import start_from
from diffusionfm.inputs import open_picture
from diffusionfm.serve.jobs import Request

from .controls import ANNOUNCE
from .lane import AT_ONCE, Lane, owner_of
from .request import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS
from .shelf import Progress, bar, data_url, draw_all, empty, file_stem, line

NO_AXIS, NO_LORA = "none", "none"
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
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


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
    lora: gr.Dropdown
    picture: gr.File
    stage: gr.HTML
    status: gr.HTML
    said: gr.HTML


def grid(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    drawing = at.draw.click(
        tab.draw,
        [
            at.prompt,
            at.x,
            at.xs,
            at.y,
            at.ys,
            at.seed,
            at.steps,
            at.guidance,
            at.negative,
            at.lora,
            at.picture,
        ],
        [at.stage, at.status, at.said, at.draw, at.cancel],
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
        concurrency_id="grid",
        concurrency_limit=AT_ONCE,
    )
    drawing.failure(tab.rest, None, [at.status, at.draw, at.cancel], **QUIET)
    at.cancel.click(tab.cancelled, None, [at.status, at.said, at.draw, at.cancel], cancels=[drawing], **QUIET)
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
            parts["stage"] = gr.HTML(
                empty(
                    "The sheet appears here.",
                    f"Two settings against each other, {sheets.MOST} pictures at most.",
                ),
                elem_id="grid-stage",
            )
            parts["status"] = gr.HTML("", elem_id="grid-status")
            parts["said"] = gr.HTML(
                "", elem_id="grid-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE
            )
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
    gr.HTML(line(HELP))
    with gr.Row(elem_classes="actions"):
        parts["draw"] = gr.Button(
            "Draw the grid", variant="primary", size="lg", scale=3, min_width=120, elem_id="grid-draw"
        )
        parts["cancel"] = gr.Button(
            "Cancel", size="lg", scale=1, min_width=90, interactive=False, elem_id="grid-cancel"
        )
    return parts


def _settings(lane: Lane) -> dict[str, Any]:
    defaults, loras = lane.pipe.defaults, list(lane.pipe.loras)
    return {
        "seed": gr.Number(
            0,
            label="Seed",
            info="The same for every picture, so that they can be compared.",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            elem_id="grid-seed",
        ),
        "steps": gr.Slider(
            1, MAX_STEPS, value=defaults["steps"], step=1, label="Steps", elem_id="grid-steps"
        ),
        "guidance": gr.Slider(0, MAX_GUIDANCE, value=defaults["guidance"], step=0.1, label="Guidance"),
        "negative": gr.Textbox(label="Leave out", max_length=MAX_PROMPT),
        "lora": gr.Dropdown([NO_LORA, *loras], value=NO_LORA, label="LoRA", visible=bool(loras)),
        "picture": gr.File(
            label="A picture to set out from, for strength",
            file_types=["image"],
            type="binary",
            height=110,
            elem_id="grid-picture",
        ),
    }


class Tab:
    """What the tab's components do."""

    def __init__(self, lane: Lane, at: Controls):
        self.lane, self.at = lane, at

    def draw(
        self,
        prompt: str,
        x: str,
        xs: str,
        y: str,
        ys: str,
        seed: int | None,
        steps: int,
        guidance: float,
        negative: str | None,
        lora: str,
        picture: bytes | None,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """The drawing: progress, then the sheet."""
        base = {
            "prompt": (prompt or "").strip(),
            "negative_prompt": (negative or "").strip(),
            "seed": random.randrange(2**31) if seed is None else int(seed),
            "steps": int(steps),
            "guidance": float(guidance),
            "loras": () if lora == NO_LORA else ((lora, self.lane.pipe.loras[lora]),),
        }
        try:
            across = sheets.parse_axis(x, xs)
            down = None if y == NO_AXIS else sheets.parse_axis(y, ys)
            requests = self._requests(sheets.plan_grid(base, across, down), picture)
        except ValueError as error:
            raise gr.Error(str(error), title="This grid cannot be drawn", duration=10) from error
        yield {
            self.at.said: f"Drawing {len(requests)} pictures.",
            self.at.draw: gr.Button(interactive=False),
            self.at.cancel: gr.Button(interactive=True),
        }
        for event in draw_all(self.lane, owner_of(request), requests):
            if isinstance(event, Progress):
                yield {self.at.status: bar(event, len(requests))}
                continue
            common = {
                "": base["prompt"],
                "seed": base["seed"],
                "steps": base["steps"],
                "guidance": base["guidance"],
            }
            facts = {name: value for name, value in common.items() if name not in (x, y)}
            sheet = sheets.draw_sheet([drawn.images[0] for drawn in event], across, down, facts)
            told = f"{len(requests)} pictures, {x} across" + (f", {y} down" if down else "")
            yield self.rest() | {
                self.at.stage: _figure(sheet, told, file_stem(f"grid {base['prompt']}")),
                self.at.status: line(told),
                self.at.said: f"The sheet is drawn: {told}.",
            }

    def _requests(self, cells: list[sheets.Settings], picture: bytes | None) -> list[Request]:
        strengths = [cell.pop("strength", None) for cell in cells]
        if picture is None:
            if any(strength is not None for strength in strengths):
                raise ValueError("strength needs a picture to set out from: give one")
            return [Request(**cell) for cell in cells]
        width, height = (self.lane.pipe.defaults[side] for side in ("width", "height"))
        image = open_picture(picture)
        return [
            Request(**cell, start=start_from(image, width, height, strength))
            for cell, strength in zip(cells, strengths, strict=True)
        ]

    def rest(self) -> dict[Any, Any]:
        """Ready for the next drawing."""
        return {
            self.at.status: "",
            self.at.draw: gr.Button(interactive=True),
            self.at.cancel: gr.Button(interactive=False),
        }

    def cancelled(self) -> dict[Any, Any]:
        """After Cancel, which left the drawing's iterator."""
        return self.rest() | {self.at.status: line("Cancelled."), self.at.said: "Cancelled."}


def _figure(sheet: Any, told: str, name: str) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    source = data_url(buffer.getvalue())
    return (
        f'<figure class="card wide"><img class="whole" src="{source}" alt="{escape(told)}"><figcaption>'
        f'<span class="seed">{escape(told)}</span>'
        f'<a href="{source}" download="{name}.png" aria-label="Download the sheet as PNG">Download the sheet</a>'
        "</figcaption></figure>"
    )
