"""The Vary tab: others like a picture, a picture made into another, and parts of it painted over and drawn anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from diffusionfm.drawing import Pictures
from diffusionfm.edit import VARIATIONS, default_strength, start_from
from diffusionfm.images import prompt_in
from diffusionfm.inputs import contain, open_picture
from diffusionfm.serve.jobs import Request

from .adapters import Picker, place
from .cards import note, notes, veiled
from .controls import QUIET, SHOWN, actions, easel, tuning
from .create import roll
from .drawtab import Chosen, DrawTab
from .editor import canvas_of, editor, painted
from .lane import REFUSED, Asked, Drawing, Lane, Update
from .request import MAX_COUNT, MAX_PROMPT, MAX_SEED, encode, seeds_in_words, small
from .shelf import LAST, TAKE, bytes_of, shelf

HINT = "Others like yours appear here.", "Upload a picture, or take the last one from Create."
AUTO = 0.0
HOW_FAR = {"auto": AUTO, **VARIATIONS, "anew": 1.0}
"""What the picker offers, and the strength that each stands for; `AUTO` leaves it to the library."""
MOST_SIDE = 2048
"""Pixels of the longer side of a picture that a page keeps."""


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
    adapter: Picker
    count: gr.Slider
    seed: gr.Number
    fresh: gr.Checkbox
    negative: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    stage: gr.HTML
    status: gr.HTML
    advice: gr.HTML
    said: gr.HTML


def vary(lane: Lane) -> None:
    """Lay out the tab inside the open gr.Tab and wire it to the lane."""
    page: Any = gr.context.Context.block
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    tab.wire([at.draw.click, at.prompt.submit])
    at.far.input(lambda word: HOW_FAR[word], at.far, at.strength, **QUIET)
    given = [at.picture, at.canvas, at.prompt, at.said]
    model = lane.model.choice
    at.upload.upload(tab.upload, [at.upload, model], given, **SHOWN)
    at.last.click(tab.take, [at.url, model], given, js=LAST, **SHOWN)
    at.stage.click(tab.take_again, model, given, **SHOWN)
    # an editor that a reload fills while its tab is hidden would stay as small as it was laid out there
    page.select(lambda picture: gr.ImageEditor(visible=picture is not None), at.picture, at.canvas, **QUIET)


def lay_out(lane: Lane) -> Controls:
    """Place every component inside the open Blocks."""
    with gr.Row(elem_classes="desk", equal_height=False):
        with gr.Column(min_width=240, elem_classes=["sheet", "ask"]):
            parts = _asking()
        with gr.Column(min_width=240, elem_classes=["sheet", "tune"]):
            parts |= _settings(lane)
        with gr.Column(min_width=240, elem_classes="easel"):
            parts |= easel("vary-", HINT, TAKE)
    return Controls(**parts)


def _asking() -> dict[str, Any]:
    with gr.Row(elem_classes="givers"):
        upload = gr.UploadButton(
            "Upload a picture", file_types=["image"], type="filepath", min_width=120, elem_id="vary-upload"
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
    parts["draw"], parts["cancel"] = actions("Vary", "vary-draw", "vary-cancel")
    return parts


def _settings(lane: Lane) -> dict[str, Any]:
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
        "adapter": place(lane.pickers["vary"]),
        "count": gr.Slider(1, MAX_COUNT, value=4, step=1, label="Pictures", elem_id="vary-count"),
        "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="vary-seed"),
        "fresh": gr.Checkbox(True, label="A new seed for every drawing", container=False),
    }
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        return parts | tuning(lane, "vary-")


class Tab(DrawTab):
    """What the tab's components do."""

    at: Controls
    name, hint = "vary", HINT

    @property
    def form(self) -> list[Any]:
        """As `plan` takes them."""
        at = self.at
        told = [at.picture, at.canvas, at.prompt, at.negative, at.far, at.strength]
        return [*told, at.seed, at.fresh, at.count, at.steps, at.guidance]

    def plan(
        self,
        chosen: Chosen,
        picture: Image.Image | None,
        canvas: dict[str, Any] | None,
        prompt: str | None,
        negative: str | None,
        far: str,
        strength: float,
        seed: int | None,
        fresh: bool,
        count: int,
        steps: int,
        guidance: float,
    ) -> list[Asked]:
        """One request, which sets out from the picture."""
        if picture is None:
            raise gr.Error(
                "Upload a picture first, or take the last one from Create.", title="No picture yet"
            )
        width, height = self.lane.models.engine(chosen.model).pipe.size_for(max(picture.size))
        mask = painted(canvas, picture.size)
        asked = Request(
            (prompt or "").strip(),
            (negative or "").strip(),
            int(count),
            roll() if fresh or seed is None else int(seed),
            int(steps),
            float(guidance),
            height=height,
            width=width,
            loras=self.worn(chosen),
            start=start_from(picture, width, height, strength or None, mask),
        )
        return [(chosen.model, asked)]

    def finished(self, drawing: Drawing, drawn: list[Pictures]) -> Update:
        """The pictures, each to be varied again."""
        asked, (result,) = drawing.requests[0], drawn
        assert asked.start is not None
        files = encode(result, self.lane.metadata)
        told = " · ".join(
            [asked.prompt or "no prompt", f"strength {asked.start.strength:g}", seeds_in_words(result.seeds)]
        )
        advice = [*result.warnings, *veiled(result.flagged)]
        return {
            self.at.stage: shelf(
                files,
                [asked.prompt] * len(files),
                result.seeds,
                take="Vary this",
                flagged=bool(result.flagged),
            ),
            self.at.status: note(told),
            self.at.advice: notes(advice, "warn"),
            self.at.said: " ".join([f"{len(files)} drawn: {told}.", *advice]),
        }

    def upload(self, file: str, model: str | None) -> Update:
        """`give` an uploaded file."""
        try:
            return self.give(small(file).read_bytes(), model)
        except ValueError as error:
            raise gr.Error(str(error), title="Too large", duration=10) from error

    def give(self, data: bytes, model: str | None) -> Update:
        """A picture to set out from, of the model's shape; the prompt that its file tells; a fresh canvas to paint on.

        It is fitted when it is drawn from, to the model that is chosen then: scaled twice, what stays would change."""
        try:
            size = self.lane.models.engine(model).pipe.defaults
            picture = shaped(open_picture(data), size["width"], size["height"])
        except REFUSED as error:
            raise gr.Error(str(error), title="Not a picture that can be read", duration=10) from error
        prompt = prompt_in(data)
        return {
            self.at.picture: picture,
            self.at.canvas: gr.ImageEditor(canvas_of(picture), visible=True),
            self.at.prompt: prompt or gr.skip(),
            self.at.said: f"Picture taken{f': {prompt}' if prompt else ''}.",
        }

    def take(self, url: str | None, model: str | None) -> Update:
        """`give` a picture of this page."""
        try:
            data = bytes_of(url or "")
        except ValueError as error:
            raise gr.Error(str(error), title="No picture taken", duration=6) from error
        return self.give(data, model)

    def take_again(self, event: gr.EventData, model: str | None) -> Update:
        """A result's "Vary this"."""
        return self.take(str(event.value), model)


def shaped(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A picture on a transparent ground of the shape of width x height, in its own pixels, up to MOST_SIDE of them."""
    scale = max(picture.width / width, picture.height / height)
    scale = min(scale, MOST_SIDE / max(width, height))
    return contain(picture, max(1, round(width * scale)), max(1, round(height * scale)))
