"""What the Create tab shows: its components and where they stand. What they do is in create.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusionfm.colors import COLORS
from diffusionfm.phrasing import STYLES

from . import cards
from .adapters import Picker, place
from .lane import Lane
from .request import (
    AS_WRITTEN,
    MAX_COUNT,
    MAX_GUIDANCE,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    NOTHING,
    sizes,
    usual_size,
)

SHOWN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {"queue": False, **SHOWN}
"""Of events that programs are not offered: those that queue, whose errors are shown, and those that take no time."""
ANNOUNCE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
HERE = Path(__file__).parent
TELL = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-value]');
  if (button) trigger('click', {value: button.dataset.value});
});"""
TICKET = """(...given) => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const fresh = Array.from(bytes, byte => byte.toString(16).padStart(2, '0')).join('');
  const ticket = sessionStorage.getItem('diffusionfm-ticket') ?? fresh;
  sessionStorage.setItem('diffusionfm-ticket', ticket);
  return [ticket, ...given.slice(1)];
}"""
"""Of an event: its first input is the secret name of the browser's tab, which finds its drawings after a reload."""
SAVE = """parcel => {
  if (!parcel) return;
  const link = document.createElement('a');
  [link.download, link.href] = parcel;
  link.click();
}"""
"""Saves a file that the page was given: its name, and a data URL."""


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    prompt: gr.Textbox
    draw: gr.Button
    cancel: gr.Button
    background: gr.Radio
    style: gr.Dropdown
    count: gr.Slider
    seed: gr.Number
    dice: gr.Button
    reuse: gr.Button
    fresh: gr.Checkbox
    negative: gr.Textbox
    size: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    adapter: Picker
    stage: gr.HTML
    status: gr.HTML
    advice: gr.HTML
    said: gr.HTML
    history: gr.HTML
    lessons: gr.HTML
    last: gr.State
    parcel: gr.JSON


def lay_out(lane: Lane) -> Controls:
    """Place every component inside the open Blocks."""
    with gr.Row(
        elem_classes="desk", equal_height=False
    ):  # a grid in style.css: on a phone pictures follow the prompt
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts = _asking()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _looks() | {"adapter": place(lane.pickers["create"])} | _seeds()
            parts |= _settings(lane)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts |= easel("", cards.EMPTY, _script("create.js"))
    parts["history"] = gr.HTML(cards.history(), elem_id="history", js_on_load=_script("history.js"))
    parts["lessons"] = gr.HTML(cards.examples(), elem_id="lessons", js_on_load=TELL)
    return Controls(
        **parts,
        last=gr.State(None),
        parcel=gr.JSON(label="Parcel", visible="hidden"),
    )


# ------------------------------------------------------------------ what several tabs have


def actions(word: str, draw: str, cancel: str) -> tuple[gr.Button, gr.Button]:
    """The buttons that draw and that cancel; their ids."""
    with gr.Row(elem_classes="actions"):
        return (
            gr.Button(word, variant="primary", size="lg", scale=3, min_width=120, elem_id=draw),
            gr.Button("Cancel", size="lg", scale=1, min_width=90, interactive=False, elem_id=cancel),
        )


def easel(prefix: str, hint: tuple[str, str], script: str) -> dict[str, Any]:
    """Where pictures come to stand, with lines under them, one of those for ears alone; prefix: of their ids."""
    silent: dict[str, Any] = {"elem_classes": "visually-hidden", "js_on_load": ANNOUNCE}
    return {
        "stage": gr.HTML(cards.empty(*hint), elem_id=f"{prefix}stage", js_on_load=script),
        "status": gr.HTML("", elem_id=f"{prefix}status"),
        "advice": gr.HTML("", elem_id=f"{prefix}advice"),
        "said": gr.HTML("", elem_id=f"{prefix}announcer", **silent),
    }


def tuning(lane: Lane, prefix: str = "") -> dict[str, Any]:
    """Steps and guidance, which follow the model that is chosen, and what to leave out; prefix: of their ids."""
    defaults = lane.pipe.defaults
    negative = gr.Textbox(
        label="Leave out",
        placeholder="what should not be in it",
        max_length=MAX_PROMPT,
        elem_id=f"{prefix}negative",
    )
    steps = gr.Slider(
        1,
        MAX_STEPS,
        value=defaults["steps"],
        step=1,
        label="Steps",
        elem_id=f"{prefix}steps",
        info="More steps draw finer and take longer.",
    )
    guidance = gr.Slider(
        0,
        MAX_GUIDANCE,
        value=defaults["guidance"],
        step=0.1,
        label="Guidance",
        elem_id=f"{prefix}guidance",
        info="Higher follows the prompt more closely and varies less.",
    )
    lane.model.steps.append(steps)
    lane.model.guidance.append(guidance)
    return {"negative": negative, "steps": steps, "guidance": guidance}


# ------------------------------------------------------------------ parts of Create


def _script(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _asking() -> dict[str, Any]:
    parts: dict[str, Any] = {
        "prompt": gr.Textbox(
            label="Prompt",
            placeholder="a red apple",
            lines=1,  # or Enter would begin a new line instead of a drawing
            max_lines=6,
            autofocus=True,
            max_length=MAX_PROMPT,
            elem_id="prompt",
        )
    }
    parts["draw"], parts["cancel"] = actions("Generate", "generate", "cancel")
    return parts


def _looks() -> dict[str, Any]:
    return {
        "background": gr.Radio(
            [NOTHING, *COLORS],
            value=NOTHING,
            label="Background",
            elem_id="background",
            elem_classes="swatches",
        ),
        "style": gr.Dropdown([AS_WRITTEN, *STYLES], value=AS_WRITTEN, label="Style", elem_id="style"),
        "count": gr.Slider(1, MAX_COUNT, value=4, step=1, label="Pictures", elem_id="count"),
    }


def _seeds() -> dict[str, Any]:
    with gr.Row(elem_classes="seeds"):
        number = gr.Number(
            0,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            min_width=110,
            scale=3,
            elem_id="seed",
        )
        small: dict[str, Any] = {"size": "sm", "min_width": 76, "scale": 1}
        dice = gr.Button("Dice", elem_id="dice", elem_classes="glyph dice", **small)
        reuse = gr.Button("Reuse", elem_id="reuse", elem_classes="glyph reuse", **small)
    fresh = gr.Checkbox(True, label="A new seed for every drawing", elem_id="fresh", container=False)
    return {"seed": number, "dice": dice, "reuse": reuse, "fresh": fresh}


def _settings(lane: Lane) -> dict[str, Any]:
    with gr.Accordion("More settings", open=False, elem_id="more", elem_classes="more"):
        size = gr.Dropdown(
            sizes(lane.pipe),
            value=usual_size(lane.pipe),
            label="Size",
            elem_id="size",
            info="Larger ones are the same picture with finer edges. Other shapes are drawn with less care.",
        )
        lane.model.size.append(size)
        return {"size": size} | tuning(lane)
