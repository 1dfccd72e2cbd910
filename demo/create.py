"""The Create tab: a prompt becomes pictures, with previews, progress and a Cancel that stops in a step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import gradio as gr

from diffusionfm.drawing import Cancelled
from diffusionfm.serve.jobs import Request

from . import cards
from .controls import Controls, lay_out
from .lane import AT_ONCE, REFUSED, Lane, Step, owner_of
from .request import AS_WRITTEN, NOTHING, asked_for, compose, encode, seeds_in_words

Update = dict[Any, Any]
"""New values by component."""


def create(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the lane."""
    tab = Tab(lane, lay_out(lane.pipe.defaults))
    at = tab.at
    seen = [at.stage, at.status, at.said, at.generate, at.cancel]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        [at.generate.click, at.prompt.submit],
        tab.begin,
        [at.prompt, at.seed, at.fresh, at.count],
        [*seen, at.seed],
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=None,  # queued, for an error of an unqueued event is not shown; yet it waits for nobody
    ).success(
        tab.draw,
        [at.prompt, at.style, at.background, at.negative, at.seed, at.steps, at.guidance, at.count],
        [*seen, at.last],
        show_progress="hidden",
        api_visibility="private",
        concurrency_id="lane",
        concurrency_limit=AT_ONCE,
        scroll_to_output=True,
    ).failure(tab.fail, None, seen, **quiet)
    at.cancel.click(tab.cancel, None, [at.status, at.cancel], **quiet)
    at.dice.click(lambda: (roll(), False), None, [at.seed, at.fresh], **quiet)
    at.reuse.click(
        lambda seed: (gr.skip() if seed is None else seed, False), at.last, [at.seed, at.fresh], **quiet
    )
    at.stage.click(tab.keep, None, [at.seed, at.fresh, at.said], **quiet)
    at.lessons.click(tab.teach, None, [at.prompt, at.style, at.background], **quiet)


def roll() -> int:
    """A random seed, short enough to read out."""
    return random.randrange(2**31)


class Tab:
    """What the tab's components do. One person's drawing at a time, told apart by session."""

    def __init__(self, lane: Lane, at: Controls):
        self.lane = lane
        self.at = at

    def begin(
        self, prompt: str | None, seed: int | None, fresh: bool, count: int, request: gr.Request
    ) -> Update:
        """The click: blank frames, a place in the lane, a seed."""
        if not (prompt or "").strip():
            raise gr.Error(
                "Type a prompt first: a red apple, for one.", title="Nothing to draw yet", duration=6
            )
        others = self.lane.enter(owner_of(request))
        company = f"Drawing beside {others} other{'s' * (others > 1)}." if others else ""
        return {
            self.at.stage: cards.drawing([], count),
            self.at.status: cards.note(company) or cards.progress(0, 1, None),
            self.at.said: company or "Drawing.",
            self.at.seed: roll() if fresh or seed is None else seed,
            self.at.generate: gr.Button(interactive=False),
            self.at.cancel: gr.Button(interactive=True),
        }

    def draw(
        self,
        prompt: str,
        style: str,
        background: str,
        negative: str,
        seed: int,
        steps: int,
        guidance: float,
        count: int,
        request: gr.Request,
    ) -> Iterator[Update]:
        """The drawing: progress at every step, previews now and then, the pictures at last."""
        asked = asked_for(compose(prompt, style, background), negative, seed, steps, guidance, count)
        try:
            for event in self.lane.draw(owner_of(request), asked):
                if isinstance(event, Step):
                    yield self._progress(event, count)
                else:
                    yield self._finished(asked, event)
        except Cancelled:
            yield self.clear() | {self.at.status: cards.note("Cancelled."), self.at.said: "Cancelled."}
        except REFUSED as error:
            raise gr.Error(str(error), duration=10) from error

    def clear(self) -> Update:
        """The bare stage, ready for the next drawing."""
        return self._ready() | {
            self.at.stage: cards.empty(),
            self.at.status: "",
            self.at.said: "Nothing was drawn.",
        }

    def fail(self, request: gr.Request) -> Update:
        """After an error, which Gradio shows: the owner's place is freed, the page is ready again."""
        self.lane.leave(owner_of(request))
        return self.clear()

    def cancel(self, request: gr.Request) -> Update:
        """Stop this person's drawing, and nobody else's."""
        self.lane.cancel(owner_of(request))
        return {self.at.status: cards.note("Stopping …"), self.at.cancel: gr.Button(interactive=False)}

    def keep(self, event: gr.EventData) -> Update:
        """A picture's "Keep seed": its seed stays for the next drawing."""
        return {
            self.at.seed: int(event.value),
            self.at.fresh: False,
            self.at.said: f"Seed {event.value} kept for the next drawing.",
        }

    def teach(self, event: gr.EventData) -> Update:
        """An example fills the prompt; the pickers step aside, for its words say it all."""
        return {self.at.prompt: event.value, self.at.style: AS_WRITTEN, self.at.background: NOTHING}

    def _progress(self, event: Step, count: int) -> Update:
        line = {self.at.status: cards.progress(event.step, event.total, event.seconds_left)}
        return line | ({self.at.stage: cards.drawing(event.previews, count)} if event.previews else {})

    def _finished(self, asked: Request, result: Any) -> Update:
        files, words = encode(self.lane.pipe, asked, result), asked.prompt
        warning = " ".join(result.warnings)
        told = f"{words} · {seeds_in_words(result.seeds)}"
        number = "One picture" if len(files) == 1 else f"{len(files)} pictures"
        return self._ready() | {
            self.at.stage: cards.results(words, files, result.seeds),
            self.at.status: cards.note(warning, "warn") or cards.note(told),
            self.at.said: f"{number} drawn: {told}. {warning}".strip(),
            self.at.last: result.seeds[0],
        }

    def _ready(self) -> Update:
        return {
            self.at.generate: gr.Button(interactive=True),
            self.at.cancel: gr.Button(interactive=False),
        }
