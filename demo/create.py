"""The Create tab: a prompt becomes pictures, with previews, progress and a Cancel that stops in a step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import gradio as gr

from diffusionfm.drawing import Pictures

from . import cards
from .controls import QUIET, SAVE, SHOWN, TICKET, Controls, lay_out
from .drawtab import Chosen, DrawTab
from .lane import Asked, Drawing, Lane, Update
from .request import (
    AS_WRITTEN,
    NOTHING,
    asked_for,
    compose,
    encode,
    file_name,
    seeds_in_words,
    sizes,
    svg,
    zip_of,
)


def create(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    tab.wire([at.draw.click, at.prompt.submit], more=(at.last,))
    at.dice.click(lambda: (roll(), False), None, [at.seed, at.fresh], **QUIET)
    at.reuse.click(
        lambda seed: (gr.skip() if seed is None else seed, False), at.last, [at.seed, at.fresh], **QUIET
    )
    parts = [at.seed, at.fresh, at.said, at.status, at.parcel]
    at.stage.click(tab.act, lane.ticket, parts, js=TICKET, concurrency_limit=4, **SHOWN).then(
        None, at.parcel, None, js=SAVE, **QUIET
    )
    at.lessons.click(tab.teach, None, [at.prompt, at.style, at.background], **QUIET)


def roll() -> int:
    """A random seed, short enough to read out."""
    return random.randrange(2**31)


class Tab(DrawTab):
    """What the tab's components do."""

    at: Controls
    name = "create"

    @property
    def form(self) -> list[Any]:
        """As `plan` takes them."""
        at = self.at
        looks = [at.prompt, at.style, at.background, at.negative]
        return [*looks, at.seed, at.fresh, at.steps, at.guidance, at.size, at.count]

    def plan(
        self,
        chosen: Chosen,
        prompt: str | None,
        style: str,
        background: str,
        negative: str,
        seed: int | None,
        fresh: bool,
        steps: int,
        guidance: float,
        size: str,
        count: int,
    ) -> list[Asked]:
        """One request for all pictures, with the pickers' words in the prompt."""
        if not (prompt or "").strip():
            raise gr.Error(
                "Type a prompt first: a red apple, for one.", title="Nothing to draw yet", duration=6
            )
        seed = roll() if fresh or seed is None else seed
        words = compose(prompt or "", style, background)
        asked = asked_for(words, negative, seed, steps, guidance, count, size)
        return [(chosen.model, replace(asked, loras=self.worn(chosen)))]

    def recalled(self, drawing: Drawing, model: str | None) -> Update:
        """The form again, without a size that the model now chosen does not draw."""
        again = super().recalled(drawing, model)
        if again[self.at.size] not in sizes(self.lane.models.engine(model).pipe):
            del again[self.at.size]
        return again

    def finished(self, drawing: Drawing, drawn: list[Pictures]) -> Update:
        """The pictures with their buttons, and the seed for Reuse."""
        asked, (result,) = drawing.requests[0], drawn
        told = f"{asked.prompt} · {seeds_in_words(result.seeds)}"
        number = "One picture" if len(result.images) == 1 else f"{len(result.images)} pictures"
        advice = [*result.warnings, *cards.veiled(result.flagged)]
        return {
            self.at.stage: cards.results(
                encode(result, self.lane.metadata),
                result.told,
                bool(result.flagged),
            ),
            self.at.status: cards.note(told),
            self.at.advice: cards.notes(advice, "warn"),
            self.at.said: " ".join([f"{number} drawn: {told}.", *advice]),
            self.at.last: result.seeds[0],
        }

    def act(self, ticket: str, event: gr.EventData, request: gr.Request) -> Update:
        """What a finished picture's buttons do: "keep SEED", "svg NUMBER" or "zip"."""
        verb, _, number = str(event.value).partition(" ")
        if verb == "keep":
            said = f"Seed {int(number)} kept for the next drawing."
            return {
                self.at.seed: int(number),
                self.at.fresh: False,
                self.at.said: said,
                self.at.status: cards.note(said),
                self.at.parcel: None,
            }
        drawing = self.find(ticket, request)
        if drawing is None or drawing.ended is None:
            raise gr.Error("These pictures are no longer here: draw them again, with the same seed.")
        asked, (pictures,) = drawing.requests[0], drawing.pictures()
        if verb == "zip":
            data = zip_of(pictures, asked.prompt, self.lane.metadata)
            return self._hand_over(f"{file_name(asked.prompt)}.zip", "application/zip", data)
        seed = pictures.seeds[int(number)]
        data = svg(pictures, int(number), self.lane.metadata)
        return self._hand_over(f"{file_name(asked.prompt, seed)}.svg", "image/svg+xml", data)

    def teach(self, event: gr.EventData) -> Update:
        """An example fills the prompt; the pickers step aside, for its words say it all."""
        return {self.at.prompt: event.value, self.at.style: AS_WRITTEN, self.at.background: NOTHING}

    def _hand_over(self, name: str, kind: str, data: bytes) -> Update:
        return {self.at.parcel: [name, cards.data_url(data, kind)]}
