"""The Restore tab: what a picture's file tells of how it was drawn, ours or AUTOMATIC1111's, and back into Create.

Settings that were copied, or are kept in Create's history, go back into Create the same way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from diffusionfm.images import PARAMETERS, encode_png, parse_a1111, read_parameters
from diffusionfm.inputs import contain, open_picture
from diffusionfm.pipeline import DiffusionFMPipeline

from .adapters import MAX_WEIGHT, NONE, choices, find
from .cards import data_url, empty, note, notes
from .controls import ANNOUNCE, QUIET, SHOWN
from .lane import Lane, Update
from .models import KEEP, choose, following, kept
from .request import AS_WRITTEN, MAX_PROMPT, NOTHING, in_range, size_name, sizes, small

WORDS = {"negative_prompt": "leave out", "model_hash": "its weights", "lora": "LoRA"}
STARTED = "it was drawn from another picture, which is not told"
CREATE = (
    "prompt", "negative", "seed", "fresh", "steps", "guidance", "size", "style", "background", "advice", "announcer",
)  # fmt: skip
"""The components of Create that are filled, by their ids on the page."""


def restore(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks. The tabs that draw must be laid out before: they are filled from here."""
    root = gr.context.Context.root_block
    assert root is not None
    on_page: dict[Any, Any] = {
        block.elem_id: block for block in root.blocks.values() if getattr(block, "elem_id", None)
    }
    at = {name: on_page[name] for name in CREATE}
    who = [lane.person, lane.model.choice, *(picker.choice for picker in lane.pickers.values())]
    filled = list(dict.fromkeys([*following(lane), *at.values()]))
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            file = gr.File(
                label="A PNG or WebP that a generator wrote",
                file_types=[".png", ".webp"],
                type="filepath",
                height=160,
                elem_id="restore-file",
            )
            send = gr.Button(
                "Send to Create", variant="primary", size="lg", interactive=False, elem_id="restore-send"
            )
            gr.HTML(
                note(
                    "Read here: this studio's own notes, and the parameters that AUTOMATIC1111 and its kin write."
                )
            )
        with gr.Column(min_width=240, elem_classes="easel"):
            shown = gr.HTML(
                empty(
                    "What the picture tells appears here.",
                    "Its prompt, seed and settings, if the file has them.",
                ),
                elem_id="restore-shown",
            )
            said = gr.HTML(
                "", elem_id="restore-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE
            )
    found = gr.State(None)

    def read(file: str | None) -> tuple[Any, ...]:
        if file is None:
            return gr.skip(), "", None, gr.Button(interactive=False)
        try:
            data = small(file).read_bytes()
            parameters = read_parameters(io.BytesIO(data))
            picture = contain(open_picture(data), 256, 256)
        except ValueError as error:
            raise gr.Error(str(error), title="Not a picture that can be read", duration=10) from error
        told = (
            "The picture tells its settings."
            if parameters
            else "This picture tells nothing of how it was made."
        )
        shown = tell(encode_png(picture), parameters, lane.models.names)
        return shown, told, parameters, gr.Button(interactive="prompt" in parameters)

    def sent(told: dict[str, Any] | None, person: str, model: str, *worn: str) -> Update:
        new = recall(lane, at, person, model, worn, told or {})
        return new | {on_page["tabs"]: gr.Tabs(selected="Create"), said: "Sent to Create."}

    def pasted(event: gr.EventData, person: str, model: str, *worn: str) -> Update:
        return recall(lane, at, person, model, worn, parse_a1111(str(event.value)[: 4 * MAX_PROMPT]))

    slow: dict[str, Any] = SHOWN | {"concurrency_limit": 4}  # a model may have to be opened
    file.change(read, file, [shown, said, found, send], **SHOWN)
    for done in (
        send.click(sent, [found, *who], [*filled, on_page["tabs"], said], **slow),
        on_page["history"].click(pasted, who, filled, **slow),
    ):
        done.then(None, kept(lane), js=KEEP, **QUIET)


def tell(picture: bytes, parameters: dict[str, Any], models: Sequence[str]) -> str:
    """The picture and what its file says, as HTML; a warning where none of these models drew it."""
    rows = "".join(
        f"<dt>{escape(WORDS.get(name, name))}</dt><dd>{escape(_said(parameters[name]))}</dd>"
        for name in PARAMETERS
        if name in parameters
    )
    words = []
    if not parameters:
        words.append("this picture tells nothing of how it was made")
    elif parameters.get("model", models[0]) not in models:
        words.append(_no_model(parameters["model"]))
    if "strength" in parameters:
        words.append(STARTED)
    board = f'<div class="board"><img src="{data_url(picture)}" alt="The picture that was read"></div>'
    return f'<div class="told"><div class="card">{board}</div><div><dl>{rows}</dl>{notes(words, "warn")}</div></div>'


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _no_model(name: str) -> str:
    return f"the model {name!r} that drew it is not here: another will draw a different picture"


# ------------------------------------------------------------------ back into Create


def recall(
    lane: Lane, at: dict[str, Any], person: str, model: str, worn: Sequence[str], told: dict[str, Any]
) -> Update:
    """Settings that a picture tells, into Create's controls, with the model and the adapter, as far as they are here.

    Values are brought into their control's range; what is not told stays. Create's advice says what cannot be had.
    at: components by `CREATE`. model, worn: what is chosen now, the adapter of each picker."""
    new, words = {}, [STARTED] if "strength" in told else []
    name = told.get("model", model)
    if name not in lane.models.names:
        words.append(_no_model(name))
    elif name != model:
        new, model = choose(lane, person, name, *worn), name
    pipe = lane.models.engine(model).pipe
    if told.get("model") == model and told.get("model_hash", pipe.model_hash) != pipe.model_hash:
        words.append(
            f"{model} had other weights, or another precision, when it was drawn: the picture may differ"
        )
    within = in_range(told)
    for name, value in within.items():
        new[at[name]] = value
        if value != told[name]:
            words.append(f"{name} {told[name]} is out of range here: {value} will be drawn, another picture")
    prompt = told.get("prompt", "")[:MAX_PROMPT]
    new |= {at["prompt"]: prompt, at["negative"]: told.get("negative_prompt", "")[:MAX_PROMPT]}
    new |= {at["style"]: AS_WRITTEN, at["background"]: NOTHING}
    new |= {at["fresh"]: False} if "seed" in within else {}
    if "width" in told and "height" in told:
        own = sizes(pipe)
        size = size_name(told["width"], told["height"])
        new[at["size"]] = gr.Dropdown(own, value=size if size in own else own[0])
        if size not in own:
            words.append(f"{size} pixels is not a size of {model}: {own[0]} will be drawn, another picture")
    choice, weight, amiss = _worn(lane, person, pipe, told.get("lora") or [])
    picker = lane.pickers["create"]
    new |= {picker.choice: gr.Dropdown(choices(lane, person), value=choice), picker.weight: weight}
    words += amiss
    new |= {at["advice"]: notes(words, "warn")}
    return new | {at["announcer"]: " ".join([f"Settings restored: {prompt}.", *words])}


def _worn(
    lane: Lane, person: str, pipe: DiffusionFMPipeline, told: str | list[Any]
) -> tuple[str, float, list[str]]:
    """The adapter that a picture was drawn with, of "name:weight", and its weight; and in words what is not here."""
    loras = [told] if isinstance(told, str) else [str(lora) for lora in told]
    if not loras:
        return NONE, 1.0, []
    if len(loras) > 1:
        return NONE, 1.0, [f"it was drawn with the adapters {', '.join(loras)}, and Create takes one alone"]
    found = re.fullmatch(r"(.+?)(?::(\d+(?:\.\d+)?))?", loras[0], re.DOTALL)
    name, weight = (found[1], float(found[2] or 1)) if found else (loras[0], 1.0)
    choice = find(lane, person, name, pipe)
    if choice is None or weight > MAX_WEIGHT:
        return (
            NONE,
            1.0,
            [f"the adapter {loras[0]} that drew it cannot be had here: a different picture without it"],
        )
    return choice, weight, []
