"""What the tabs that draw have in common: a click begins a drawing, the page watches it, a reload finds it again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusionfm.drawing import Cancelled, Pictures

from . import cards
from .adapters import wear
from .controls import QUIET, SHOWN, TICKET
from .lane import REFUSED, Asked, Drawing, Lane, Step, Update, Waiting, owner_of, turn_of


@dataclass(frozen=True)
class Chosen:
    """Who asks, and the model, adapter and weight that they chose for the tab."""

    person: str
    model: str | None
    adapter: str | None
    weight: float


class DrawTab:
    """A tab that draws: one drawing at a time for the browser's tab, which alone knows its ticket.

    at: its components, among them draw, cancel, stage, status, advice, said, seed and adapter. A subclass names itself,
    says what is asked for (`plan`) and what is made of the pictures (`finished`)."""

    name = ""
    hint = cards.EMPTY
    amiss = "Not now"  # the title of what is refused

    def __init__(self, lane: Lane, at: Any):
        self.lane, self.at = lane, at

    # -------------------------------------------------------------- what a tab says of itself

    @property
    def form(self) -> list[Any]:
        """The components that say what to draw: a reload fills them again."""
        raise NotImplementedError

    def plan(self, chosen: Chosen, *form: Any) -> list[Asked]:
        """What is asked for; gr.Error, or one of REFUSED, for what cannot be drawn."""
        raise NotImplementedError

    def finished(self, drawing: Drawing, drawn: list[Pictures]) -> Update:
        """The pictures on the stage, and what to say of them: status, advice and said."""
        raise NotImplementedError

    def blank(self, drawing: Drawing, previews: list[Any] | None = None) -> str:
        """The stage while it draws."""
        return cards.drawing(previews or [], drawing.count)

    def seed(self, drawing: Drawing) -> int:
        """The seed to show, rolled or given."""
        return drawing.requests[0].seed

    def recalled(self, drawing: Drawing, model: str | None) -> Update:
        """What was asked for, back into the form of a page that has chosen a model."""
        return {**drawing.given, self.at.seed: self.seed(drawing)}

    def worn(self, chosen: Chosen) -> Any:
        """What requests ask the chosen model's engine for, so that it draws with the chosen adapter."""
        engine = self.lane.models.engine(chosen.model)
        return wear(self.lane, engine, chosen.person, chosen.adapter, chosen.weight)

    # -------------------------------------------------------------- events

    def wire(self, triggers: list[Any], more: tuple[Any, ...] = ()) -> None:
        """Connect drawing, Cancel, and what a reload finds. more: components that `finished` fills besides."""
        at, ticket = self.at, self.lane.ticket
        who = [self.lane.person, self.lane.model.choice, at.adapter.choice, at.adapter.weight]
        seen = [at.stage, at.status, at.advice, at.said, at.draw, at.cancel]
        once: dict[str, Any] = {"js": TICKET, "trigger_mode": "once", **SHOWN}
        # queued, for an error of an unqueued event is not shown; yet it waits for nobody
        asked = [ticket, *who, *self.form]
        begun = gr.on(triggers, self.begin, asked, [*seen, at.seed], concurrency_limit=None, **once)
        self._follow(begun, [*seen, *more], scroll_to_output=True)

        def rejoin(opened: Any) -> None:
            filled = dict.fromkeys([*seen, *self.form, at.seed])
            found = opened.then(self.rejoin, [ticket, self.lane.model.choice], [*filled], js=TICKET, **QUIET)
            self._follow(found, [*seen, *more])

        self.lane.opened.append(rejoin)
        at.cancel.click(self.cancel, ticket, js=TICKET, **QUIET)

    def _follow(self, begun: Any, seen: list[Any], **how: Any) -> None:
        """Watch the drawing once it has begun: the lane bounds how many there are, each has one onlooker."""
        how |= {"concurrency_limit": None, "js": TICKET, **SHOWN}
        watched = begun.success(self.watch, self.lane.ticket, seen, **how)
        watched.failure(self.clear, None, seen, **QUIET)

    def begin(
        self,
        ticket: str,
        person: str,
        model: str | None,
        adapter: str | None,
        weight: float,
        request: gr.Request,
        *form: Any,
    ) -> Update:
        """The click: a place in the queue, blank frames."""
        owner, page, turn = self._owner(ticket, request), owner_of(request), turn_of(request)
        last = self.lane.find(owner, page)
        if last is not None and last.ended is None and not last.cancelled:
            raise gr.Error(
                "The last drawing is still under way: cancel it first.", title="Not yet", duration=6
            )
        try:
            asked = self.plan(Chosen(person, model, adapter, weight), *form)
            given = dict(zip(self.form, form, strict=True))
            drawing = self.lane.start(owner, asked, page, turn, given)
        except REFUSED as error:
            raise gr.Error(str(error), title=self.amiss, duration=10) from error
        return self._begun(drawing) | {self.at.seed: self.seed(drawing)}

    def watch(self, ticket: str, request: gr.Request) -> Iterator[Update]:
        """The drawing: its place, progress at every step, previews now and then, the pictures at last."""
        drawing, event = self.lane.find(self._owner(ticket, request), owner_of(request)), None
        if drawing is None:
            yield {self.at.said: gr.skip()}
            return
        try:
            for event in self.lane.watch(drawing):
                if isinstance(event, list):
                    yield self._ready() | self.finished(drawing, event)
                else:
                    yield self._progress(drawing, event)
            if not isinstance(event, list):
                yield self.clear() | {self.at.status: cards.note("Shown in another window of this browser.")}
        except Cancelled:
            yield self.clear() | {self.at.status: cards.note("Cancelled."), self.at.said: "Cancelled."}
        except REFUSED as error:
            raise gr.Error(str(error), duration=10) from error

    def rejoin(self, ticket: str, model: str | None, request: gr.Request) -> Update:
        """A page that is opened: after a reload, what it was drawing and what was asked for."""
        drawing = self.find(ticket, request)
        if drawing is None:
            self.lane.forget(self._owner(ticket, request))  # what was stopped was told to the page before
            return {self.at.said: gr.skip()}
        return self._begun(drawing) | self.recalled(drawing, model)

    def find(self, ticket: str, request: gr.Request) -> Drawing | None:
        """This person's drawing on this tab, under way or of late; None where it was stopped."""
        drawing = self.lane.find(self._owner(ticket, request), owner_of(request))
        return None if drawing is None or drawing.cancelled else drawing

    def cancel(self, ticket: str, request: gr.Request) -> None:
        """Stop this person's drawing, and nobody else's. `watch` tells of it: a word from here could come after it."""
        self.lane.cancel(self._owner(ticket, request))

    def clear(self) -> Update:
        """The bare stage, ready for the next drawing: after Cancel, and after an error, which Gradio shows."""
        at = self.at
        bare = {
            at.stage: cards.empty(*self.hint),
            at.status: "",
            at.advice: "",
            at.said: "Nothing was drawn.",
        }
        return self._ready() | bare

    def _owner(self, ticket: str, request: gr.Request) -> str:
        """Who draws, and where: the browser's tab, which keeps its ticket over a reload."""
        known = isinstance(ticket, str) and re.fullmatch(r"[0-9a-f]{32}", ticket)
        return f"{ticket if known else owner_of(request)} {self.name}"

    def _begun(self, drawing: Drawing) -> Update:
        advice = [*drawing.advice, *filter(None, [self.lane.runs.company()])]
        return {
            self.at.stage: self.blank(drawing),
            self.at.status: cards.waiting(0),
            self.at.advice: cards.notes(advice, "warn"),
            self.at.said: " ".join(["Drawing.", *advice]),
            self.at.draw: gr.Button(interactive=False),
            self.at.cancel: gr.Button(interactive=True),
        }

    def _progress(self, drawing: Drawing, event: Waiting | Step) -> Update:
        if isinstance(event, Waiting):
            line = {self.at.status: cards.waiting(event.ahead)}
            return line | ({self.at.said: cards.place(event.ahead)} if event.ahead else {})
        several = drawing.count if len(drawing.requests) > 1 else 0
        line = {self.at.status: cards.progress(event.step, event.total, event.seconds_left, several)}
        return line | ({self.at.stage: self.blank(drawing, event.previews)} if event.previews else {})

    def _ready(self) -> Update:
        return {self.at.draw: gr.Button(interactive=True), self.at.cancel: gr.Button(interactive=False)}
