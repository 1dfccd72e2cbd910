"""The Restore tab: what a picture's file tells of how it was drawn, ours or AUTOMATIC1111's, and back into Create."""

from __future__ import annotations

import io
from html import escape
from typing import Any

import gradio as gr

from diffusionfm.images import PARAMETERS, encode_png, read_parameters
from diffusionfm.inputs import contain, open_picture

from .cards import data_url, empty, note, notes
from .controls import ANNOUNCE, QUIET, SHOWN
from .lane import Lane
from .request import AS_WRITTEN, MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, NOTHING, small

WORDS = {"negative_prompt": "leave out", "lora": "LoRA"}
CREATE = ("prompt", "negative", "seed", "fresh", "steps", "guidance", "style", "background")
"""The components of Create that are filled, by their ids on the page."""


def restore(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks. Create must be laid out before: its controls are filled from here."""
    root = gr.context.Context.root_block
    assert root is not None
    on_page = {block.elem_id: block for block in root.blocks.values() if getattr(block, "elem_id", None)}
    filled = [on_page[name] for name in CREATE]
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

    def read(file: str | None, model: str) -> tuple[Any, ...]:
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
        shown = tell(encode_png(picture), parameters, model)
        return shown, told, parameters, gr.Button(interactive="prompt" in parameters)

    file.change(read, [file, lane.model.choice], [shown, said, found, send], **SHOWN)
    send.click(
        lambda parameters: [*controls_of(parameters or {}), gr.Tabs(selected="Create"), "Sent to Create."],
        found,
        [*filled, on_page["tabs"], said],
        **QUIET,
    )


def tell(picture: bytes, parameters: dict[str, Any], model: str) -> str:
    """The picture and what its file says, as HTML; a warning where another model drew it."""
    rows = "".join(
        f"<dt>{escape(WORDS.get(name, name))}</dt><dd>{escape(_said(parameters[name]))}</dd>"
        for name in PARAMETERS
        if name in parameters
    )
    words = []
    if not parameters:
        words.append("this picture tells nothing of how it was made")
    elif parameters.get("model", model) != model:
        words.append(f"another model drew it; {model}, which is chosen, will draw a different picture")
    if "strength" in parameters:
        words.append("it was drawn from another picture, which the file does not hold")
    board = f'<div class="board"><img src="{data_url(picture)}" alt="The picture that was read"></div>'
    return f'<div class="told"><div class="card">{board}</div><div><dl>{rows}</dl>{notes(words, "warn")}</div></div>'


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def controls_of(parameters: dict[str, Any]) -> list[Any]:
    """Values for `CREATE`, each brought into its control's range; what is not told stays as it is."""

    def within(name: str, low: float, high: float) -> Any:
        return min(max(parameters[name], low), high) if name in parameters else gr.skip()

    return [
        parameters.get("prompt", "")[:MAX_PROMPT],
        parameters.get("negative_prompt", "")[:MAX_PROMPT],
        within("seed", 0, MAX_SEED),
        False if "seed" in parameters else gr.skip(),
        within("steps", 1, MAX_STEPS),
        within("guidance", 0, MAX_GUIDANCE),
        AS_WRITTEN,
        NOTHING,
    ]
