"""The Vary tab: others like a picture, a picture made into another, and parts of it painted over and drawn anew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from diffusionfm.drawing import Pictures
from diffusionfm.edit import VARIATIONS, default_strength, start_from
from diffusionfm.images import prompt_in
from diffusionfm.inputs import contain, open_picture
from diffusionfm.serve.jobs import Request

from .cards import veiled
from .controls import ANNOUNCE
from .editor import canvas_of, editor, painted
from .lane import AT_ONCE, Lane, owner_of
from .request import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, encode, seeds_in_words
from .shelf import LAST, TAKE, Progress, bar, blank, bytes_of, draw_all, empty, line, shelf

MAX_COUNT = 8
HINT = "Others like yours appear here.", "Upload a picture, or take the last one from Create."
AUTO = 0.0
HOW_FAR = {"auto": AUTO, **VARIATIONS, "anew": 1.0}
"""What the picker offers, and the strength that each stands for; `AUTO` leaves it to the library."""
SHOWN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {"queue": False, **SHOWN}


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    upload: gr.UploadButton
    last: gr.Button
    picture: gr.State
    canvas: gr.ImageEditor
    url: gr.Textbox
    prompt: gr.Textbox
    draw: gr.Button
    cancel: gr.Button
    far: gr.Radio
    strength: gr.Slider
    count: gr.Slider
    seed: gr.Number
    fresh: gr.Checkbox
    negative: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    stage: gr.HTML
    status: gr.HTML
    said: gr.HTML


def vary(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane.pipe.defaults))
    at = tab.at
    seen = [at.stage, at.status, at.said, at.draw, at.cancel, at.seed]
    drawing = gr.on(
        [at.draw.click, at.prompt.submit],
        tab.draw,
        [
            at.picture,
            at.canvas,
            at.prompt,
            at.negative,
            at.strength,
            at.seed,
            at.fresh,
            at.count,
            at.steps,
            at.guidance,
        ],
        seen,
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
        concurrency_id="vary",
        concurrency_limit=AT_ONCE,
    )
    drawing.failure(tab.clear, None, [at.stage, at.status, at.draw, at.cancel], **QUIET)
    at.cancel.click(
        tab.cancelled, None, [at.stage, at.status, at.said, at.draw, at.cancel], cancels=[drawing], **QUIET
    )
    at.far.input(lambda word: HOW_FAR[word], at.far, at.strength, **QUIET)
    given = [at.picture, at.canvas, at.prompt, at.said]
    at.upload.upload(tab.give, at.upload, given, **SHOWN)
    at.last.click(tab.take, at.url, given, js=LAST, **SHOWN)
    at.stage.click(tab.take_again, None, given, **SHOWN)


def lay_out(defaults: dict[str, Any]) -> Controls:
    """Place every component inside the open Blocks; `defaults` are the model's steps and guidance."""
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts = _asking()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _settings(defaults)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts["stage"] = gr.HTML(
                empty(
                    "Others like yours appear here.", "Upload a picture, or take the last one from Create."
                ),
                elem_id="vary-stage",
                js_on_load=TAKE,
            )
            parts["status"] = gr.HTML("", elem_id="vary-status")
            parts["said"] = gr.HTML(
                "", elem_id="vary-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE
            )
    return Controls(**parts)


def _asking() -> dict[str, Any]:
    with gr.Row(elem_classes="givers"):
        upload = gr.UploadButton(
            "Upload a picture", file_types=["image"], type="binary", min_width=120, elem_id="vary-upload"
        )
        last = gr.Button("Take the last one from Create", min_width=120, elem_id="vary-last")
    parts: dict[str, Any] = {
        "upload": upload,
        "last": last,
        "picture": gr.State(None),
        "canvas": editor("Paint over what is to be drawn anew", "vary-canvas"),
        "url": gr.Textbox(label="Picture as a URL", visible="hidden"),
        "prompt": gr.Textbox(
            label="Prompt",
            info="What the result should show. Empty: whatever the model sees in it.",
            placeholder="a red apple with a green leaf",
            lines=1,
            max_lines=4,
            max_length=MAX_PROMPT,
            elem_id="vary-prompt",
        ),
    }
    with gr.Row(elem_classes="actions"):
        parts["draw"] = gr.Button(
            "Vary", variant="primary", size="lg", scale=3, min_width=120, elem_id="vary-draw"
        )
        parts["cancel"] = gr.Button(
            "Cancel", size="lg", scale=1, min_width=90, interactive=False, elem_id="vary-cancel"
        )
    return parts


def _settings(defaults: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "far": gr.Radio(
            list(HOW_FAR),
            value="auto",
            label="How far from the picture",
            info="Where you painted, auto draws anew, and all else stays as it is.",
            elem_id="vary-far",
        ),
        "strength": gr.Slider(
            AUTO,
            1,
            value=AUTO,
            step=0.01,
            label="Strength",
            info=f"0 is auto: {default_strength(False)}, or {default_strength(True):g} where you painted.",
            elem_id="vary-strength",
        ),
        "count": gr.Slider(1, MAX_COUNT, value=4, step=1, label="Pictures", elem_id="vary-count"),
        "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="vary-seed"),
        "fresh": gr.Checkbox(True, label="A new seed for every drawing", container=False),
    }
    with gr.Accordion("More settings", open=False):
        parts["negative"] = gr.Textbox(label="Leave out", max_length=MAX_PROMPT)
        parts["steps"] = gr.Slider(1, MAX_STEPS, value=defaults["steps"], step=1, label="Steps")
        parts["guidance"] = gr.Slider(0, MAX_GUIDANCE, value=defaults["guidance"], step=0.1, label="Guidance")
    return parts


class Tab:
    """What the tab's components do."""

    def __init__(self, lane: Lane, at: Controls):
        self.lane, self.at = lane, at

    def draw(
        self,
        picture: Image.Image | None,
        canvas: dict[str, Any] | None,
        prompt: str | None,
        negative: str | None,
        strength: float,
        seed: int | None,
        fresh: bool,
        count: int,
        steps: int,
        guidance: float,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """The drawing: progress, then the pictures."""
        if picture is None:
            raise gr.Error(
                "Upload a picture first, or take the last one from Create.", title="No picture yet"
            )
        seed = random.randrange(2**31) if fresh or seed is None else int(seed)
        mask = painted(canvas, picture.size)
        try:
            start = start_from(picture, *picture.size, strength or None, mask)
        except ValueError as error:
            raise gr.Error(str(error), duration=10) from error
        asked = Request(
            (prompt or "").strip(),
            (negative or "").strip(),
            int(count),
            seed,
            int(steps),
            float(guidance),
            start=start,
        )
        busy = {self.at.draw: gr.Button(interactive=False), self.at.cancel: gr.Button(interactive=True)}
        yield {self.at.seed: seed, self.at.said: "Drawing.", self.at.stage: blank(asked.num_images), **busy}
        for event in draw_all(self.lane, owner_of(request), [asked]):
            if isinstance(event, Progress):
                yield {self.at.status: bar(event, asked.num_images)}
            else:
                yield self._finished(asked, event[0])

    def _finished(self, asked: Request, drawn: Pictures) -> dict[Any, Any]:
        assert asked.start is not None
        files = encode(self.lane.pipe, asked, drawn)
        told = " · ".join(
            [asked.prompt or "no prompt", f"strength {asked.start.strength:g}", seeds_in_words(drawn.seeds)]
        )
        told = " ".join([told, *drawn.warnings, *veiled(drawn.flagged)])
        return self.rest() | {
            self.at.stage: shelf(
                files, [asked.prompt] * len(files), drawn.seeds, take="Vary this", flagged=bool(drawn.flagged)
            ),
            self.at.status: line(told),
            self.at.said: f"{len(files)} drawn: {told}.",
        }

    def give(self, data: bytes) -> dict[Any, Any]:
        """A picture to set out from, fitted; the prompt that its file tells; a fresh canvas to paint on."""
        defaults = self.lane.pipe.defaults
        try:
            picture = contain(open_picture(data), defaults["width"], defaults["height"])
        except ValueError as error:
            raise gr.Error(str(error), title="Not a picture that can be read", duration=10) from error
        prompt = prompt_in(data)
        return {
            self.at.picture: picture,
            self.at.canvas: gr.ImageEditor(canvas_of(picture), visible=True),
            self.at.prompt: prompt or gr.skip(),
            self.at.said: f"Picture taken{f': {prompt}' if prompt else ''}.",
        }

    def take(self, url: str | None) -> dict[Any, Any]:
        """`give` a picture of this page."""
        try:
            data = bytes_of(url or "")
        except ValueError as error:
            raise gr.Error(str(error), title="No picture yet", duration=6) from error
        return self.give(data)

    def take_again(self, event: gr.EventData) -> dict[Any, Any]:
        """A result's "Vary this"."""
        return self.take(str(event.value))

    def rest(self) -> dict[Any, Any]:
        """Ready for the next drawing."""
        return {
            self.at.status: "",
            self.at.draw: gr.Button(interactive=True),
            self.at.cancel: gr.Button(interactive=False),
        }

    def clear(self) -> dict[Any, Any]:
        """The bare stage, ready for the next drawing."""
        return self.rest() | {self.at.stage: empty(*HINT)}

    def cancelled(self) -> dict[Any, Any]:
        """After Cancel, which left the drawing's iterator."""
        return self.clear() | {self.at.status: line("Cancelled."), self.at.said: "Cancelled."}
