"""The picker of models, what follows it on a page, and what of such choices a browser's tab keeps over a reload."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from diffusionfm.pipeline import DiffusionFMPipeline

from . import cards
from .adapters import MAX_WEIGHT, NONE, choices, chosen, refreshed
from .controls import QUIET, SHOWN
from .lane import REFUSED, Lane, Update
from .request import size_name, sizes, usual_size

KEPT = ("create", "vary", "grid")
"""Tabs whose adapter and weight a reload brings back."""
KEEP = "(...chosen) => { sessionStorage.setItem('diffusionfm-chosen', JSON.stringify(chosen)); }"
KNOWN = "(person, _) => [person, JSON.parse(sessionStorage.getItem('diffusionfm-chosen'))]"


@dataclass
class Picker:
    """The picker, and what follows it: the header, and controls that tabs add when they are laid out."""

    choice: gr.Dropdown
    head: gr.HTML
    steps: list[Any] = field(default_factory=list)
    guidance: list[Any] = field(default_factory=list)
    size: list[Any] = field(default_factory=list)


def model_picker(lane: Lane) -> Picker:
    """Place the header; the picker beside it is seen where there are several models."""
    names = lane.models.names
    with gr.Row(elem_id="head"):
        head = gr.HTML(_header(lane, lane.pipe), elem_id="mast")
        choice = gr.Dropdown(
            names, value=names[0], label="Model", elem_id="model", min_width=110, scale=0, visible=len(names) > 1
        )  # fmt: skip
    return Picker(choice, head)


def _header(lane: Lane, pipe: DiffusionFMPipeline) -> str:
    size = size_name(*max(pipe.sizes or [(pipe.defaults["width"], pipe.defaults["height"])]))
    size = f"up to {size} px" if pipe.sizes else f"{size} px"
    name = [f"model {pipe.model_name}"] if len(lane.models.names) == 1 else []
    return cards.header(cards.NAME, [*name, size, "transparent"])


def following(lane: Lane) -> list[Any]:
    """The components that `choose` changes."""
    at = lane.model
    worn = [part for picker in lane.pickers.values() for part in (picker.choice, picker.weight)]
    return [at.choice, at.head, *at.steps, *at.guidance, *at.size, *worn]


def kept(lane: Lane) -> list[Any]:
    """The components whose values `KEEP` keeps: the picker of models, and the adapters and weights of `KEPT`."""
    worn = [part for tab in KEPT for part in (lane.pickers[tab].choice, lane.pickers[tab].weight)]
    return [lane.model.choice, *worn]


def wire(lane: Lane, studio: gr.Blocks) -> None:
    """Connect the pickers, once every tab is laid out."""
    found = gr.JSON(label="Kept", visible="hidden")
    everything, worn = following(lane), [picker.choice for picker in lane.pickers.values()]
    opened = studio.load(
        lambda person, kept: reopen(lane, person, kept), [lane.person, found], everything, js=KNOWN, **QUIET
    )
    for rejoin in lane.opened:
        rejoin(opened)
    lane.model.choice.input(
        lambda person, name, *worn: choose(lane, person, name, *worn),
        [lane.person, lane.model.choice, *worn],
        everything,
        **SHOWN | {"show_progress": "minimal", "concurrency_limit": 4},
    )
    gr.on([part.input for part in kept(lane)], None, kept(lane), None, js=KEEP, **QUIET)


def choose(lane: Lane, person: str, name: str, *worn: str) -> Update:
    """A model is chosen: what it is, its own steps, guidance and sizes; adapters of others are taken off.

    worn: the adapter of each picker."""
    try:
        new, pipe = follow(lane, name), lane.models.engine(name).pipe
    except REFUSED as error:
        raise gr.Error(str(error), title="Not this model", duration=10) from error
    for picker, choice in zip(lane.pickers.values(), worn, strict=True):
        new[picker.choice] = choice if _fits(lane, person, choice, pipe) else NONE
    return new


def follow(lane: Lane, name: str) -> Update:
    """What all tabs show once a model is chosen, adapters apart. Raises one of REFUSED."""
    at, pipe = lane.model, lane.models.engine(name).pipe
    new: Update = {at.choice: name, at.head: _header(lane, pipe)}
    new |= dict.fromkeys(at.steps, pipe.defaults["steps"]) | dict.fromkeys(
        at.guidance, pipe.defaults["guidance"]
    )
    return new | dict.fromkeys(at.size, gr.Dropdown(sizes(pipe), value=usual_size(pipe)))


def reopen(lane: Lane, person: str, found: Any) -> Update:
    """A page that is opened: the adapters there are, and what its browser's tab kept, as far as it still fits."""
    new = refreshed(lane, person)
    if not isinstance(found, list) or len(found) != len(kept(lane)):
        return new
    name, pipe = found[0], lane.pipe
    if name in lane.models.names[1:]:
        with suppress(*REFUSED):  # else it is the first
            new, pipe = new | follow(lane, name), lane.models.engine(name).pipe
    for tab, choice, weight in zip(KEPT, found[1::2], found[2::2], strict=True):
        picker = lane.pickers[tab]
        if _fits(lane, person, choice, pipe) and isinstance(weight, int | float):
            new[picker.choice] = gr.Dropdown(choices(lane, person), value=choice or NONE)
            new[picker.weight] = min(max(weight, 0), MAX_WEIGHT)
    return new


def _fits(lane: Lane, person: str, choice: str | None, pipe: DiffusionFMPipeline) -> bool:
    try:
        chosen(lane, person, choice, 1.0, pipe)
    except ValueError:
        return False
    return True
