"""The Create tab: a prompt becomes pictures, with previews, progress and a Cancel that stops in a step."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from diffusionfm.drawing import Cancelled, Pictures

from . import cards
from .adapters import wear
from .controls import QUIET, SAVE, SHOWN, TICKET, Controls, lay_out
from .lane import AT_ONCE, REFUSED, Drawing, Lane, Step, Update, Waiting, owner_of, turn_of
from .request import (
    AS_WRITTEN,
    NOTHING,
    asked_for,
    compose,
    encode,
    file_name,
    parameters,
    seeds_in_words,
    size_name,
    svg,
    zip_of,
)


def create(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane))
    at = tab.at
    seen = [at.stage, at.status, at.advice, at.said, at.generate, at.cancel]
    settings = [at.prompt, at.style, at.background, at.negative, at.seed, at.fresh]
    settings += [at.steps, at.guidance, at.size]
    watch: dict[str, Any] = {"concurrency_id": "lane", "concurrency_limit": AT_ONCE, "js": TICKET, **SHOWN}
    who = [lane.person, lane.model.choice, at.adapter.choice, at.adapter.weight]
    gr.on(
        [at.generate.click, at.prompt.submit],
        tab.begin,
        [*settings, at.count, *who, at.ticket],
        [*seen, at.seed],
        js=TICKET,
        trigger_mode="once",
        concurrency_limit=None,  # queued, for an error of an unqueued event is not shown; yet it waits for nobody
        **SHOWN,
    ).success(tab.draw, at.ticket, [*seen, at.last], scroll_to_output=True, **watch).failure(
        tab.fail, None, seen, **QUIET
    )

    def rejoin(opened: Any) -> None:
        opened.then(tab.rejoin, at.ticket, [*seen, *settings, at.count], js=TICKET, **QUIET).success(
            tab.draw, at.ticket, [*seen, at.last], **watch
        ).failure(tab.fail, None, seen, **QUIET)

    lane.opened = rejoin
    at.cancel.click(tab.cancel, at.ticket, [at.status, at.cancel], js=TICKET, **QUIET)
    at.dice.click(lambda: (roll(), False), None, [at.seed, at.fresh], **QUIET)
    at.reuse.click(
        lambda seed: (gr.skip() if seed is None else seed, False), at.last, [at.seed, at.fresh], **QUIET
    )
    parts = [at.seed, at.fresh, at.said, at.status, at.parcel]
    at.stage.click(tab.act, at.ticket, parts, js=TICKET, concurrency_limit=4, **SHOWN).then(
        None, at.parcel, None, js=SAVE, **QUIET
    )
    at.lessons.click(tab.teach, None, [at.prompt, at.style, at.background], **QUIET)


def roll() -> int:
    """A random seed, short enough to read out."""
    return random.randrange(2**31)


class Tab:
    """What the tab's components do. One drawing at a time for an open page, which alone knows its ticket."""

    def __init__(self, lane: Lane, at: Controls):
        self.lane = lane
        self.at = at

    def begin(
        self,
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
        person: str,
        model: str | None,
        adapter: str,
        weight: float,
        ticket: str,
        request: gr.Request,
    ) -> Update:
        """The click: a seed, a place in the queue, blank frames."""
        if not (prompt or "").strip():
            raise gr.Error(
                "Type a prompt first: a red apple, for one.", title="Nothing to draw yet", duration=6
            )
        seed = roll() if fresh or seed is None else seed
        words = compose(prompt or "", style, background)
        try:
            worn = wear(self.lane, self.lane.models.engine(model), person, adapter, weight)
            asked = replace(asked_for(words, negative, seed, steps, guidance, count, size), loras=worn)
            owner, page, turn = _owner(ticket, request), owner_of(request), turn_of(request)
            drawing = self.lane.start(owner, asked, page, model, turn)
        except REFUSED as error:
            raise gr.Error(str(error), title="Not now", duration=10) from error
        return self._begun(drawing) | {self.at.seed: seed}

    def draw(self, ticket: str, request: gr.Request) -> Iterator[Update]:
        """The drawing: its place, progress at every step, previews now and then, the pictures at last."""
        drawing = self.lane.find(_owner(ticket, request), owner_of(request))
        if drawing is None or drawing.future.cancelled():
            yield {self.at.said: gr.skip()}
            return
        try:
            for event in self.lane.watch(drawing):
                if isinstance(event, Pictures):
                    yield self._finished(drawing, event)
                else:
                    yield self._progress(event, drawing.request.num_images)
        except Cancelled:
            yield self.clear() | {self.at.status: cards.note("Cancelled."), self.at.said: "Cancelled."}
        except REFUSED as error:
            raise gr.Error(str(error), duration=10) from error

    def rejoin(self, ticket: str, request: gr.Request) -> Update:
        """A page that is opened: after a reload, what it was drawing and the settings of that."""
        drawing = self.lane.find(_owner(ticket, request), owner_of(request))
        if drawing is None or drawing.future.cancelled():
            return {self.at.said: gr.skip()}
        asked = drawing.request
        return self._begun(drawing) | {
            self.at.prompt: asked.prompt,
            self.at.negative: asked.negative_prompt,
            self.at.seed: asked.seed,
            self.at.steps: asked.steps,
            self.at.guidance: asked.guidance,
            self.at.size: size_name(asked.width, asked.height) if asked.width and asked.height else gr.skip(),
            self.at.count: asked.num_images,
        }

    def clear(self) -> Update:
        """The bare stage, ready for the next drawing."""
        return self._ready() | {
            self.at.stage: cards.empty(*cards.EMPTY),
            self.at.status: "",
            self.at.advice: "",
            self.at.said: "Nothing was drawn.",
        }

    def fail(self) -> Update:
        """After an error, which Gradio shows: the page is ready again."""
        return self.clear()

    def cancel(self, ticket: str, request: gr.Request) -> Update:
        """Stop this person's drawing, and nobody else's."""
        if not self.lane.cancel(_owner(ticket, request)):
            return {self.at.status: gr.skip()}  # it was finished already
        return {self.at.status: cards.note("Stopping …"), self.at.cancel: gr.Button(interactive=False)}

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
        drawing = self.lane.find(_owner(ticket, request), owner_of(request))
        if drawing is None or drawing.ended is None or drawing.future.cancelled():
            raise gr.Error("These pictures are no longer here: draw them again, with the same seed.")
        asked, pictures = drawing.request, drawing.future.result()
        if verb == "zip":
            data = zip_of(drawing.model, asked, pictures, self.lane.metadata)
            return self._hand_over(f"{file_name(asked.prompt)}.zip", "application/zip", data)
        seed = pictures.seeds[int(number)]
        data = svg(drawing.model, asked, pictures, int(number), self.lane.metadata)
        return self._hand_over(f"{file_name(asked.prompt, seed)}.svg", "image/svg+xml", data)

    def teach(self, event: gr.EventData) -> Update:
        """An example fills the prompt; the pickers step aside, for its words say it all."""
        return {self.at.prompt: event.value, self.at.style: AS_WRITTEN, self.at.background: NOTHING}

    def _begun(self, drawing: Drawing) -> Update:
        advice = [*drawing.advice, *filter(None, [self.lane.runs.company()])]
        return {
            self.at.stage: cards.drawing([], drawing.request.num_images),
            self.at.status: cards.waiting(0),
            self.at.advice: cards.notes(advice, "warn"),
            self.at.said: " ".join(["Drawing.", *advice]),
            self.at.generate: gr.Button(interactive=False),
            self.at.cancel: gr.Button(interactive=True),
        }

    def _progress(self, event: Waiting | Step, count: int) -> Update:
        if isinstance(event, Waiting):
            line = {self.at.status: cards.waiting(event.ahead)}
            return line | ({self.at.said: cards.place(event.ahead)} if event.ahead else {})
        line = {self.at.status: cards.progress(event.step, event.total, event.seconds_left)}
        return line | ({self.at.stage: cards.drawing(event.previews, count)} if event.previews else {})

    def _finished(self, drawing: Drawing, result: Pictures) -> Update:
        model, asked = drawing.model, drawing.request
        told = f"{asked.prompt} · {seeds_in_words(result.seeds)}"
        number = "One picture" if len(result.images) == 1 else f"{len(result.images)} pictures"
        advice = [*result.warnings, *cards.veiled(result.flagged)]
        return self._ready() | {
            self.at.stage: cards.results(
                encode(model, asked, result, self.lane.metadata),
                parameters(model, asked, result),
                bool(result.flagged),
            ),
            self.at.status: cards.note(told),
            self.at.advice: cards.notes(advice, "warn"),
            self.at.said: " ".join([f"{number} drawn: {told}.", *advice]),
            self.at.last: result.seeds[0],
        }

    def _hand_over(self, name: str, kind: str, data: bytes) -> Update:
        return {self.at.parcel: [name, cards.data_url(data, kind)]}

    def _ready(self) -> Update:
        return {
            self.at.generate: gr.Button(interactive=True),
            self.at.cancel: gr.Button(interactive=False),
        }


def _owner(ticket: str, request: gr.Request) -> str:
    """Who draws: the browser's tab, which keeps its ticket over a reload."""
    return ticket if re.fullmatch(r"[0-9a-f]{32}", ticket or "") else owner_of(request)
