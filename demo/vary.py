"""The Vary tab: others like a picture, a picture made into another, and parts of it painted over and drawn anew."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusionfm.drawing import Pictures
from diffusionfm.edit import VARIATIONS, default_strength, start_from
from diffusionfm.images import encode_png, read_parameters
from diffusionfm.inputs import open_picture
from diffusionfm.serve.jobs import Request

from .controls import ANNOUNCE
from .editor import editor, painted
from .lane import AT_ONCE, Lane, owner_of
from .request import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, seeds_in_words
from .shelf import LAST, TAKE, Progress, bar, bytes_of, draw_all, empty, line, shelf

MAX_COUNT = 8
AUTO = 0.0
HOW_FAR = {"auto": AUTO, **VARIATIONS, "anew": 1.0}
"""What the picker offers, and the strength that each stands for; `AUTO` leaves it to the library."""
SHOWN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {"queue": False, **SHOWN}


@dataclass(frozen=True)
class Controls:
    """The components of the tab, by name."""

    picture: gr.ImageEditor
    last: gr.Button
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
    drawing.failure(tab.rest, None, [at.status, at.draw, at.cancel], **QUIET)
    at.cancel.click(tab.cancelled, None, [at.status, at.said, at.draw, at.cancel], cancels=[drawing], **QUIET)
    at.far.input(lambda word: HOW_FAR[word], at.far, at.strength, **QUIET)
    at.last.click(tab.take, at.url, [at.picture, at.prompt, at.said], js=LAST, **SHOWN)
    at.stage.click(tab.take_again, None, [at.picture, at.prompt, at.said], **SHOWN)


def lay_out(defaults: dict[str, Any]) -> Controls:
    """Place every component inside the open Blocks; `defaults` are the model's steps and guidance."""
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts = _asking()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _settings(defaults)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts["stage"] = gr.HTML(
                empty("Others like yours appear here.", "Give a picture, or take the last one from Create."),
                elem_id="vary-stage",
                js_on_load=TAKE,
            )
            parts["status"] = gr.HTML("", elem_id="vary-status")
            parts["said"] = gr.HTML(
                "", elem_id="vary-announcer", elem_classes="visually-hidden", js_on_load=ANNOUNCE
            )
    return Controls(**parts)


def _asking() -> dict[str, Any]:
    parts: dict[str, Any] = {
        "picture": editor("Picture · paint over what is to be drawn anew", "vary-picture"),
        "last": gr.Button("Take the last picture from Create", size="sm", elem_id="vary-last"),
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
        value: dict[str, Any] | None,
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
        if not value or value["background"] is None:
            raise gr.Error("Give a picture first, or take the last one from Create.", title="No picture yet")
        seed = random.randrange(2**31) if fresh or seed is None else int(seed)
        defaults, mask = self.lane.pipe.defaults, painted(value)
        try:
            start = start_from(
                value["background"], defaults["width"], defaults["height"], strength or None, mask
            )
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
        yield {self.at.seed: seed, self.at.said: "Drawing.", **busy}
        for event in draw_all(self.lane, owner_of(request), [asked]):
            if isinstance(event, Progress):
                yield {self.at.status: bar(event, asked.num_images)}
            else:
                yield self._finished(asked, event[0])

    def _finished(self, asked: Request, drawn: Pictures) -> dict[Any, Any]:
        assert asked.start is not None
        settings = {
            "negative_prompt": asked.negative_prompt,
            "steps": asked.steps,
            "guidance": asked.guidance,
        }
        settings |= {"strength": asked.start.strength}
        files = []
        for image, seed in zip(drawn.images, drawn.seeds, strict=True):
            size = {"width": image.width, "height": image.height}
            files.append(encode_png(image, self.lane.pipe.describe(asked.prompt, seed, settings | size)))
        told = " · ".join(
            [asked.prompt or "no prompt", f"strength {asked.start.strength:g}", seeds_in_words(drawn.seeds)]
        )
        told = " ".join([told, *drawn.warnings])
        return self.rest() | {
            self.at.stage: shelf(files, [asked.prompt] * len(files), drawn.seeds, take="Vary this"),
            self.at.status: line(told),
            self.at.said: f"{len(files)} drawn: {told}.",
        }

    def take(self, url: str) -> tuple[Any, str, str]:
        """A picture of this page, with the prompt that its file tells."""
        try:
            data = bytes_of(url or "")
            found = read_parameters(io.BytesIO(data))
            return open_picture(data), str(found.get("prompt", "")), "Picture taken."
        except ValueError as error:
            raise gr.Error(str(error), title="No picture yet", duration=6) from error

    def take_again(self, event: gr.EventData) -> tuple[Any, str, str]:
        """A result's "Vary this"."""
        return self.take(str(event.value))

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
