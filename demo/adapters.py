"""The pickers of adapters, one a tab that draws: a person's own, and those that the studio was opened with."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusionfm.lora import CONFIG, WEIGHTS, base_of
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.wardrobe import Loras

from .lane import Lane

NONE = "none"
MAX_WEIGHT = 2.0
IDS = {"create": "adapter", "vary": "vary-adapter", "grid": "grid-adapter", "batch": "b-adapter"}
"""The pickers by tab, and their ids on the page."""


@dataclass(frozen=True)
class Picker:
    """The two components."""

    choice: gr.Dropdown
    weight: gr.Slider


@dataclass(frozen=True)
class Adapter:
    """A chosen one. source: its folder or file. name: for people; a public one is known to the engine by it."""

    name: str
    source: Path
    weight: float
    public: bool


def pickers(lane: Lane) -> dict[str, Picker]:
    """The pickers of the tabs, not placed yet: each must be known to the others' events."""
    return {tab: _picker(lane, elem_id) for tab, elem_id in IDS.items()}


def _picker(lane: Lane, elem_id: str) -> Picker:
    choice = gr.Dropdown(
        choices(lane, ""), value=NONE, label="Adapter", elem_id=elem_id, min_width=150, scale=3, render=False,
    )  # fmt: skip
    weight = gr.Slider(
        0, MAX_WEIGHT, value=1, step=0.05, label="Weight", elem_id=f"{elem_id}-weight", min_width=130, scale=2,
        render=False,
    )  # fmt: skip
    return Picker(choice, weight)


def place(picker: Picker) -> Picker:
    """Place a picker where the page is being laid out."""
    with gr.Row(elem_classes="adapter"):
        picker.choice.render()
        picker.weight.render()
    return picker


def choices(lane: Lane, person: str) -> list[tuple[str, str]]:
    """(name, value) of what a person may choose; names tell the model where there are several."""

    def told(name: str, model: str) -> str:
        return f"{name} ({model})" if model and len(lane.models.names) > 1 else name

    public = [(told(name, lane.pipe.model_name), f"public {name}") for name in lane.pipe.loras]
    done = [run for run in lane.runs.all(person, "finetune") if _is_done(run.out)]
    return [(NONE, NONE), *((told(run.facts["name"], base_of(run.out)[0]), run.key) for run in done), *public]


def refreshed(lane: Lane, person: str, chosen: str | None = None) -> dict[Any, Any]:
    """The updates of all pickers; `chosen` becomes the choice."""
    new: dict[str, Any] = {"choices": choices(lane, person)} | ({"value": chosen} if chosen else {})
    return {picker.choice: gr.Dropdown(**new) for picker in lane.pickers.values()}


def chosen(
    lane: Lane, person: str, choice: str | None, weight: float, pipe: DiffusionFMPipeline
) -> Adapter | None:
    """What was chosen. ValueError when this person has no such adapter, or it is for another model than `pipe`."""
    if choice in (None, "", NONE):
        return None
    name = str(choice).removeprefix("public ")
    if name in lane.pipe.loras and str(choice).startswith("public "):
        if pipe is not lane.pipe:
            raise ValueError(_other(name, lane.pipe.model_name))
        return Adapter(name, lane.pipe.lora_sources[name], float(weight), public=True)
    run = lane.runs.get(person, "finetune", choice)
    if run is None or not _is_done(run.out):
        raise ValueError("that adapter is gone: choose another")
    model, weights = base_of(run.out)
    if weights and pipe.base_hash not in ("", weights):
        raise ValueError(_other(run.facts["name"], model))
    return Adapter(run.facts["name"], run.out, float(weight), public=False)


def find(lane: Lane, person: str, name: str, pipe: DiffusionFMPipeline) -> str | None:
    """The choice that the file of a picture calls `name`, the latest of several; None without one for `pipe`."""
    for _, choice in choices(lane, person):
        with suppress(ValueError):  # it is for another model
            adapter = chosen(lane, person, choice, 1.0, pipe)
            known = (
                (_told(adapter.name), adapter.source.name) if adapter else ()
            )  # the second is what a batch tells
            if name in known:
                return choice
    return None


def names(lane: Lane, person: str) -> list[str]:
    """What `find` knows those by that a person may choose, and `NONE`."""
    own = [run.facts["name"] for run in lane.runs.all(person, "finetune") if _is_done(run.out)]
    return [NONE, *dict.fromkeys(map(_told, [*own, *lane.pipe.loras]))]


def wear(lane: Lane, engine: Engine, person: str, choice: str | None, weight: float) -> Loras:
    """What a request asks an engine for, so that it draws with what was chosen. Raises as `chosen` and `put_on`."""
    return put_on(engine, chosen(lane, person, choice, weight, engine.pipe))


def _other(name: str, model: str) -> str:
    return f"the adapter {name!r} is for the model {model!r}: choose that model, or another adapter"


def put_on(engine: Engine, adapter: Adapter | None) -> Loras:
    """What a request asks the engine for, which has the adapter then. Raises what `Engine.add_lora` does."""
    if adapter is None:
        return ()
    if adapter.public:
        return ((adapter.name, adapter.weight),)
    content = (adapter.source / WEIGHTS).read_bytes()
    secret = hashlib.sha256(str(adapter.source).encode() + content).hexdigest()  # which nobody guesses
    name = f"{_told(adapter.name)}+{secret}"
    engine.add_lora(adapter.source, name)
    return ((name, adapter.weight),)


def _told(name: str) -> str:
    """An adapter's name as files of pictures say it."""
    return re.sub(r"[^a-zA-Z0-9 _-]", "-", name)


def _is_done(out: Path) -> bool:
    return (out / WEIGHTS).is_file() and (out / CONFIG).is_file()
