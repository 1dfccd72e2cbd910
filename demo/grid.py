"""The Grid tab: two settings against each other, a picture for every pair of values, and the sheet to download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from diffusionfm import sheets
from diffusionfm.drawing import Pictures
from diffusionfm.edit import start_from
from diffusionfm.images import encode_png, in_common
from diffusionfm.inputs import open_picture
from diffusionfm.serve.jobs import Request
from diffusionfm.serve.models import MOST as MODELS_BESIDE
from diffusionfm.serve.wardrobe import Loras

from . import cards
from .adapters import NONE, Picker, find, names, place, wear
from .controls import SHOWN, actions, easel, tuning
from .create import roll
from .drawtab import Chosen, DrawTab
from .lane import Asked, Drawing, Lane, Update
from .request import MAX_PROMPT, MAX_SEED, file_name, sizes, small

NO_AXIS = "none"
HINT = "The sheet appears here.", f"Two settings against each other, {sheets.MOST} pictures at most."
FIRST = {
    "prompt": "rocket, ghost, house",
    "style": "flat emoji, 3D emoji, sticker",
    "background": "transparent, sky blue, gold",
    "leave out": f"{sheets.NOTHING}, outline, shadow",
    "seed": "0-3",
    "steps": "4, 8, 20",
    "guidance": "2, 4, 7, 10",
    "strength": "0.7, 0.8, 0.9, 1",
    "weight": "0, 0.5, 1",
}
"""What an axis is filled with when it is chosen; `Tab.fill` knows the others."""
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
    advice: gr.HTML
    said: gr.HTML


def grid(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    tab.wire([at.draw.click])
    for name, values in ((at.x, at.xs), (at.y, at.ys)):
        name.input(tab.fill, [name, lane.person, lane.model.choice], values, concurrency_limit=4, **SHOWN)


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
            "a flat emoji of a rocket",
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
    gr.HTML(cards.note(HELP))
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
    name, hint, amiss = "grid", HINT, "This grid cannot be drawn"

    @property
    def form(self) -> list[Any]:
        """As `plan` takes them."""
        at = self.at
        return [at.prompt, at.x, at.xs, at.y, at.ys, at.seed, at.steps, at.guidance, at.negative, at.picture]

    def plan(
        self,
        chosen: Chosen,
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
    ) -> list[Asked]:
        """A request for every pair of values."""
        base: sheets.Settings = {
            "prompt": (prompt or "").strip(),
            "negative_prompt": (negative or "").strip(),
            "seed": roll() if seed is None else int(seed),
            "steps": int(steps),
            "guidance": float(guidance),
            "model": chosen.model,
            "weight": chosen.weight,
        }
        across, down = _axes(x, xs, y, ys)
        for axis in (across, down):
            others = {*axis.values} - {self.lane.pipe.model_name} if axis and axis.name == "model" else set()
            if len(others) > MODELS_BESIDE:
                raise ValueError(
                    f"{MODELS_BESIDE} models at most are open beside {self.lane.pipe.model_name}: name fewer"
                )
        cells = sheets.plan_grid(base, across, down)
        if "weight" in (x, y) and "adapter" not in (x, y) and chosen.adapter in (None, "", NONE):
            raise ValueError("no adapter is in use: choose one for the axis to weigh")
        return self._resolved(chosen, cells, picture)

    def _resolved(self, chosen: Chosen, cells: list[sheets.Settings], picture: str | None) -> list[Asked]:
        """The requests, with their models, adapters, and what they set out from."""
        image = open_picture(small(picture)) if picture else None

        @cache
        def loras(model: str | None, adapter: str | None, weight: float) -> Loras:
            engine, choice = self.lane.models.engine(model), chosen.adapter
            if adapter is not None:
                choice = NONE if adapter == NONE else find(self.lane, chosen.person, adapter, engine.pipe)
            if choice is None:
                there = ", ".join(names(self.lane, chosen.person))
                raise ValueError(f"no adapter {adapter!r} for {engine.pipe.model_name}: there are {there}")
            return wear(self.lane, engine, chosen.person, choice, weight)

        asked: list[Asked] = []
        for cell in cells:
            model, strength = cell.pop("model"), cell.pop("strength", None)
            worn = loras(model, cell.pop("adapter", None), cell.pop("weight"))
            if strength is not None and image is None:
                raise ValueError("strength needs a picture to set out from: give one")
            size = self.lane.models.engine(model).pipe.defaults | cell
            start = start_from(image, size["width"], size["height"], strength) if image else None
            asked.append((model, Request(**cell, loras=worn, start=start)))
        return asked

    def fill(self, axis: str, person: str, model: str | None) -> str:
        """What an axis begins with when it is chosen."""
        offered: list[str] = []
        if axis == "size":
            offered = sizes(self.lane.models.engine(model).pipe)[:3]
        elif axis == "model":
            offered = self.lane.models.names[: MODELS_BESIDE + 1]
        elif axis == "adapter":
            offered = names(self.lane, person)[: sheets.MOST_VALUES]
        return FIRST.get(axis, ", ".join(offered))

    def seed(self, drawing: Drawing) -> int:
        """The field's, which a seed of an axis leaves alone."""
        given = drawing.given[self.at.seed]
        return drawing.requests[0].seed if given is None else int(given)

    def recalled(self, drawing: Drawing, model: str | None) -> Update:
        """The form again, with its picture as long as that is there."""
        again = super().recalled(drawing, model)
        file = again[self.at.picture]
        return again | {self.at.picture: file if file and Path(file).is_file() else None}

    def blank(self, drawing: Drawing, previews: list[Any] | None = None) -> str:
        """The pictures of the sheet where they will stand."""
        return cards.drawing(previews or [], drawing.count, len(self._axes_of(drawing.given)[0].values))

    def finished(self, drawing: Drawing, drawn: list[Pictures]) -> Update:
        """The sheet."""
        across, down = self._axes_of(drawing.given)
        told = f"{drawing.count} pictures, {across.name} across" + (f", {down.name} down" if down else "")
        said = in_common([its.told[0] for its in drawn])
        sheet = sheets.draw_sheet(
            [its.images[0] for its in drawn], across, down, self._facts(drawing, across, down)
        )
        flagged = [word for its in drawn for word in its.flagged]
        advice = [*dict.fromkeys(word for its in drawn for word in its.warnings), *cards.veiled(flagged)]
        return {
            self.at.stage: _figure(
                encode_png(sheet, said if self.lane.metadata else None),
                told,
                file_name(f"grid {drawing.given[self.at.prompt]}"),
                bool(flagged),
            ),
            self.at.status: "",  # the figure says it
            self.at.advice: cards.notes(advice, "warn"),
            self.at.said: " ".join([f"The sheet is drawn: {told}.", *advice]),
        }

    def _axes_of(self, given: Mapping[Any, Any]) -> tuple[sheets.Axis, sheets.Axis | None]:
        at = self.at
        return _axes(*(given[part] for part in (at.x, at.xs, at.y, at.ys)))

    def _facts(self, drawing: Drawing, across: sheets.Axis, down: sheets.Axis | None) -> dict[str, Any]:
        """What is written below the sheet: all that its pictures have in common."""
        first, moving = drawing.requests[0], [axis.name for axis in (across, down) if axis]
        facts: dict[str, Any] = {"prompt": (drawing.given[self.at.prompt] or "").strip()}
        facts |= {"seed": first.seed, "steps": first.steps, "guidance": first.guidance}
        if len(self.lane.models.names) > 1:
            facts["model"] = drawing.models[0]
        for name, scale in first.loras:
            facts["adapter"] = name.partition("+")[0] + ("" if "weight" in moving else f":{scale:g}")
        return {"" if name == "prompt" else name: fact for name, fact in facts.items() if name not in moving}


def _axes(x: str, xs: str, y: str, ys: str) -> tuple[sheets.Axis, sheets.Axis | None]:
    return sheets.parse_axis(x, xs), None if y == NO_AXIS else sheets.parse_axis(y, ys)


def _figure(sheet: bytes, told: str, name: str, flagged: bool) -> str:
    source = cards.data_url(sheet)
    return (
        f'<figure class="card wide"><div class="veiled"><img class="whole" src="{source}" alt="{escape(told)}">'
        f"{cards.VEIL if flagged else ''}</div><figcaption>"
        f'<span class="seed">{escape(told)}</span>'
        f'<a href="{source}" download="{name}.png" aria-label="Download the sheet as PNG">Download the sheet</a>'
        "</figcaption></figure>"
    )
