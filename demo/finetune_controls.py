"""What the Fine-tune tab shows: its components and where they stand. What they do is in finetune.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr
import torch

from diffusionfm.finetune import load_preset
from diffusionfm.finetune.settings import MAX_STEPS

from .cards import empty
from .controls import ANNOUNCE
from .dataset import KINDS

MISSING = {
    "the words of its file name": "name",
    "the trigger word alone": "trigger",
    "left out": "skip",
    "written in the table": "refuse",
}
PRESETS = {"laptop": "laptop: minutes on two cores", "gpu": "gpu: longer, for a graphics card"}
METHODS = {"LoRA": "lora", "DoRA": "dora"}
EVERY = 2.0  # seconds between looks at a run
EMPTY = empty("Your own style or subject.", "Ten to fifty pictures are enough to begin with.")


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    key: gr.State
    seen: gr.State
    timer: gr.Timer
    mine: gr.Dropdown
    fresh: gr.Button
    delete: gr.Button
    files: gr.File
    missing: gr.Radio
    trigger: gr.Textbox
    name: gr.Textbox
    preset: gr.Radio
    method: gr.Radio
    steps: gr.Number
    prior: gr.Checkbox
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    said: gr.HTML
    stage: gr.HTML
    curves: gr.HTML
    take: gr.File
    use: gr.Button
    table: gr.Dataframe
    report: gr.HTML

    def all(self) -> list[Any]:
        """Every component, for events that may change any."""
        return [getattr(self, field.name) for field in fields(self)]


def lay_out() -> Controls:
    """Place every component inside the open Blocks."""
    parts: dict[str, Any] = {
        "key": gr.State(""), "seen": gr.State(()), "timer": gr.Timer(EVERY, active=False),
    }  # fmt: skip
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts |= _pictures()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _training()
        with gr.Column(min_width=240, elem_classes="easel"):
            parts |= _easel()
    return Controls(**parts)


def _pictures() -> dict[str, Any]:
    with gr.Row(elem_classes="mine"):
        mine = gr.Dropdown(
            [], label="Your trainings", elem_id="ft-mine", min_width=150, scale=3, allow_custom_value=True
        )
        small: dict[str, Any] = {"size": "sm", "min_width": 64, "scale": 1}
        fresh = gr.Button("New", elem_id="ft-new", **small)
        delete = gr.Button("Delete", elem_id="ft-delete", interactive=False, **small)
    files = gr.File(
        label="Pictures with their captions, or a zip",
        file_count="multiple", file_types=KINDS, elem_id="ft-files", height=170,
    )  # fmt: skip
    missing = gr.Radio(
        [*MISSING.items()], value="name", label="The caption of a picture without one", elem_id="ft-missing"
    )
    trigger = gr.Textbox(
        label="Trigger word", placeholder="zkw", max_length=40, elem_id="ft-trigger",
        info="For one subject: a made-up word that will stand for it in prompts.",
    )  # fmt: skip
    return {
        "mine": mine,
        "fresh": fresh,
        "delete": delete,
        "files": files,
        "missing": missing,
        "trigger": trigger,
    }


def _training() -> dict[str, Any]:
    offered = [
        (label, name) for name, label in PRESETS.items() if name == "laptop" or torch.cuda.is_available()
    ]
    name = gr.Textbox(label="Name", value="my style", max_length=60, elem_id="ft-name")
    preset = gr.Radio(offered, value="laptop", label="Preset", elem_id="ft-preset")
    with gr.Row(elem_classes="pair"):
        method = gr.Radio(
            [*METHODS.items()], value="lora", label="Method", elem_id="ft-method", min_width=120
        )
        steps = gr.Number(
            load_preset("laptop").trainer.steps, label="Steps at most", precision=0, minimum=1, maximum=MAX_STEPS,
            elem_id="ft-steps", min_width=120,
        )  # fmt: skip
    prior = gr.Checkbox(
        False, label="Keep what it could draw before (slower)", elem_id="ft-prior", container=False
    )
    with gr.Row(elem_classes="actions"):
        start = gr.Button(
            "Start training", variant="primary", size="lg", scale=3, min_width=120, elem_id="ft-start",
            interactive=False,
        )  # fmt: skip
        stop = gr.Button("Stop", size="lg", scale=1, min_width=90, interactive=False, elem_id="ft-stop")
    return {
        "name": name, "preset": preset, "method": method, "steps": steps, "prior": prior, "start": start, "stop": stop,
    }  # fmt: skip


def _easel() -> dict[str, Any]:
    return {
        "status": gr.HTML("", elem_id="ft-status"),
        "said": gr.HTML("", elem_id="ft-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE),
        "stage": gr.HTML(EMPTY, elem_id="ft-stage"),
        "curves": gr.HTML("", elem_id="ft-curves"),
        "use": gr.Button("Draw with it in Create", variant="primary", visible=False, elem_id="ft-use"),
        "take": gr.File(label="Take it with you", visible=False, interactive=False, elem_id="ft-take"),
        "report": gr.HTML("", elem_id="ft-report"),
        "table": gr.Dataframe(
            headers=["Picture", "Caption"], column_count=2, datatype="str", type="array", static_columns=[0],
            interactive=True, wrap=True, column_widths=["35%", "65%"], label="Captions: click one to change it",
            visible=False, buttons=[], max_height=420, elem_id="ft-table",
        ),
    }  # fmt: skip
