"""What the Batch tab shows: its components and where they stand. What they do is in batch.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from diffusionfm.batch.readers import FORMATS

from .adapters import Picker, place
from .cards import empty
from .controls import ANNOUNCE
from .lane import Lane
from .request import MAX_SEED

KINDS = {"PNG": "png", "WebP": "webp", "SVG": "svg"}
PLACES = {"files in a zip": "folder", "WebDataset shards": "webdataset", "Parquet": "parquet"}
MOST_EACH = 20
EVERY = 2.0  # seconds between looks at a run
EXAMPLE = "a {red|blue|green} apple\na flat emoji of a smiling cat --d 7\na 3D emoji of a rocket --s 20 --l 5"
EMPTY = empty("A picture for every line.", "Write some prompts, see the plan, draw them all.")


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    key: gr.State
    seen: gr.State
    timer: gr.Timer
    mine: gr.Dropdown
    fresh: gr.Button
    delete: gr.Button
    rows: gr.Textbox
    file: gr.File
    repeats: gr.Slider
    seed: gr.Number
    format: gr.Radio
    to: gr.Radio
    adapter: Picker
    plan: gr.Button
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    said: gr.HTML
    report: gr.HTML
    stage: gr.HTML
    take: gr.File

    def all(self) -> list[Any]:
        """Every component, for events that may change any; the picker's two among them."""
        found = [getattr(self, field.name) for field in fields(self) if field.name != "adapter"]
        return [*found, self.adapter.choice, self.adapter.weight]


def lay_out(lane: Lane) -> Controls:
    """Place every component inside the open Blocks."""
    parts: dict[str, Any] = {
        "key": gr.State(""), "seen": gr.State(()), "timer": gr.Timer(EVERY, active=False),
    }  # fmt: skip
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts |= _rows()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _settings(lane)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts |= {
                "status": gr.HTML("", elem_id="b-status"),
                "said": gr.HTML(
                    "", elem_id="b-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE
                ),
                "report": gr.HTML("", elem_id="b-report"),
                "take": gr.File(label="Take it with you", visible=False, interactive=False, elem_id="b-take"),
                "stage": gr.HTML(EMPTY, elem_id="b-stage"),
            }
    return Controls(**parts)


def _rows() -> dict[str, Any]:
    with gr.Row(elem_classes="mine"):
        mine = gr.Dropdown([], label="Your batches", elem_id="b-mine", min_width=150, scale=3)
        small: dict[str, Any] = {"size": "sm", "min_width": 64, "scale": 1}
        fresh = gr.Button("New", elem_id="b-new", **small)
        delete = gr.Button("Delete", elem_id="b-delete", interactive=False, **small)
    rows = gr.Textbox(
        label="Prompts, one a line", lines=7, max_lines=16, placeholder=EXAMPLE, elem_id="b-rows", max_length=1_000_000,
        info="{red|blue} makes a row of each; --w --h --s --l --d --n set width, height, steps, guidance, seed and "
        "what to leave out.",
    )  # fmt: skip
    file = gr.File(
        label=f"or a file of rows: {', '.join(FORMATS)}", file_types=[*FORMATS], elem_id="b-file", height=150
    )
    return {"mine": mine, "fresh": fresh, "delete": delete, "rows": rows, "file": file}


def _settings(lane: Lane) -> dict[str, Any]:
    parts: dict[str, Any] = {"adapter": place(lane.pickers["batch"])}
    with gr.Row(elem_classes="pair"):
        parts["repeats"] = gr.Slider(
            1, MOST_EACH, value=1, step=1, label="Pictures a row", elem_id="b-repeats", min_width=130
        )
        parts["seed"] = gr.Number(
            0,
            label="Seed of the run",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            elem_id="b-seed",
            min_width=110,
        )
    parts["format"] = gr.Radio([*KINDS.items()], value="png", label="Pictures as", elem_id="b-format")
    parts["to"] = gr.Radio([*PLACES.items()], value="folder", label="Handed over as", elem_id="b-to")
    with gr.Row(elem_classes="actions"):
        parts["plan"] = gr.Button("Plan", size="lg", scale=2, min_width=120, elem_id="b-plan")
        parts["start"] = gr.Button(
            "Draw them", variant="primary", size="lg", scale=2, min_width=110, elem_id="b-start"
        )
        parts["stop"] = gr.Button(
            "Stop", size="lg", scale=1, min_width=80, interactive=False, elem_id="b-stop"
        )
    return parts
