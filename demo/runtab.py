"""What the tabs of long runs have in common: which run is open, its buttons, and looks at it while it goes on."""

from __future__ import annotations

import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from diffusionfm.serve.access import Access
from diffusionfm.serve.gate import TAKEN

from .cards import note
from .lane import REFUSED, Lane, Update
from .runs import Run, State

HIDDEN: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": None,
}
"""Of an event that programs are not offered, and that waits for no other."""
CONFIRM = "(...given) => confirm('Delete it and all that it made?') ? given : ['', '']"


def told(event: Callable[..., Any]) -> Callable[..., Any]:
    """An event that tells the person what is refused."""

    @wraps(event)
    def wrapped(*args: Any) -> Any:
        try:
            return event(*args)
        except (*REFUSED, OSError) as error:
            raise gr.Error(str(error), title="Not like this", duration=12) from error

    return wrapped


def turn_of(request: gr.Request, run: Run) -> str:
    """Whose turn a run takes: the login's or the key's, or where there is none that of its person at an address."""
    return Access.turn(request.state.caller, run.person)


class RunTab:
    """A tab around runs of one kind. A run is known by its person and its key.

    at: the tab's components, among them key, seen, timer, mine, fresh, delete, start, stop, status and said.
    form: those that may be changed only before a run is begun. A subclass says what is shown of a run."""

    kind = ""
    verb = ""  # on the start button

    def __init__(self, lane: Lane, at: Any, form: list[Any]):
        self.lane, self.runs, self.at, self.form = lane, lane.runs, at, form

    def fresh(self, person: str) -> Update:
        """An empty page for another run."""
        raise NotImplementedError

    def shown(self, person: str, run: Run) -> Update:
        """All of a run that has settings."""
        raise NotImplementedError

    def progress(self, person: str, run: Run, seen: tuple) -> Update:
        """What of a run under way, or ended, is not as it was `seen`."""
        raise NotImplementedError

    def wire(self, everything: list[Any]) -> None:
        """Connect what all such tabs have; the subclass connects the rest."""
        at, who = self.at, [self.lane.person, self.at.key]
        at.stop.click(self.stop, who, everything, **HIDDEN)
        at.fresh.click(self.fresh, self.lane.person, everything, **HIDDEN)
        at.delete.click(self.delete, who, everything, js=CONFIRM, **HIDDEN)
        at.mine.input(self.open, [self.lane.person, at.mine], everything, **HIDDEN)
        at.timer.tick(self.watch, [*who, at.seen], everything, queue=False, **HIDDEN)
        page: Any = gr.context.Context.root_block
        page.load(self.reopen, self.lane.person, everything, queue=False, **HIDDEN)

    # -------------------------------------------------------------- events

    @property
    def same(self) -> Update:
        """Nothing new; Gradio would take an empty dict for a value."""
        return {self.at.timer: gr.skip()}

    def draft(self, person: str, key: str) -> Run | None:
        """The open run, unless it was begun already."""
        run = self.runs.get(person, self.kind, key)
        return run if run is not None and self.runs.state(run).word == "draft" else None

    @told
    def stop(self, person: str, key: str) -> Update:
        """Stop the run; it keeps what it has made."""
        run = self.runs.get(person, self.kind, key)
        if run is None or "commands" not in run.facts:
            return self.same
        self.runs.stop(run)
        return self.progress(person, run, ())

    @told
    def open(self, person: str, key: str) -> Update:
        """Show a run of this person."""
        return self.page(person, self.runs.get(person, self.kind, key))

    def reopen(self, person: str) -> Update:
        """A page that is opened: the run under way, or else the latest."""
        runs = self.runs.all(person, self.kind)
        run = next((run for run in runs if self.runs.state(run).busy), runs[0] if runs else None)
        return self.page(person, run)

    def page(self, person: str, run: Run | None) -> Update:
        """All of a run, or an empty page; of one whose making broke off, an empty page that can be filled again."""
        if run is None:
            return self.fresh(person)
        if "settings" not in run.facts:
            shown = {self.at.key: run.key, self.at.delete: gr.Button(interactive=True)}
            return self.fresh(person) | self.listed(person, run) | shown
        return self.shown(person, run)

    @told
    def delete(self, person: str, key: str) -> Update:
        """Remove the run that is open and all it made."""
        run = self.runs.get(person, self.kind, key)
        if run is None:
            return self.same
        self.runs.delete(run)
        return self.fresh(person)

    def watch(self, person: str, key: str, seen: tuple) -> Update:
        """A tick: what has changed since the last."""
        run = self.runs.get(person, self.kind, key)
        if run is None:
            return {self.at.timer: gr.Timer(active=False)}
        return self.progress(person, run, tuple(seen))

    # -------------------------------------------------------------- parts of what is shown

    def handed(self, files: list[Path]) -> gr.File:
        """Files to take away: copies that are not counted for uploads."""
        place = str(Path(self.at.take.GRADIO_CACHE) / TAKEN)
        return gr.File([save_file_to_cache(file, place) for file in files], visible=True)

    def buttons(self, state: State, may: bool = True, there: bool = True) -> Update:
        """The buttons of a state, and the clock; may: whether a draft can be begun.

        The clock goes on where a run can be taken up again: else a late answer to an old tick could stop it then."""
        word = {"stopped": "Resume", "failed": "Try again"}.get(state.word, self.verb)
        can = state.word in ("stopped", "failed") or (state.word == "draft" and may)
        return {
            self.at.start: gr.Button(word, interactive=can),
            self.at.stop: gr.Button(interactive=state.busy and state.word != "stopping"),
            self.at.delete: gr.Button(interactive=there and not state.busy),
            self.at.timer: gr.Timer(active=state.word not in ("draft", "done")),
        }

    def filled(self, editable: bool, values: Update | None = None) -> Update:
        """The form with these values, to be changed or not; places to upload to are there only to be used."""
        shown: Update = {}
        for part in self.form:
            given = {"value": values[part]} if values and part in values else {}
            given |= {"visible": editable} if isinstance(part, gr.File) else {}
            shown[part] = type(part)(interactive=editable, **given)
        return shown

    def listed(self, person: str, run: Run | None) -> Update:
        """The person's runs, this one open."""
        mine = [(each.facts["name"], each.key) for each in self.runs.all(person, self.kind)]
        return {self.at.mine: gr.Dropdown(choices=mine, value=run.key if run else None)}


_packing = threading.Lock()


def packed(run: Run, target: Path, files: Iterable[tuple[Path, str]], how: int) -> Path:
    """A zip of files, (file, its name inside), made whole or not at all, and once for each time that the run ended."""
    with _packing:
        ended = run.ended  # before the files are read: what goes on meanwhile ends later
        if ended and target.is_file() and target.stat().st_mtime_ns == ended:
            return target
        with tempfile.TemporaryDirectory(dir=run.folder, prefix=".") as place:
            made = Path(place) / target.name
            with zipfile.ZipFile(made, "w", how) as archive:
                for file, name in files:
                    archive.write(file, name)
            os.utime(made, ns=(ended, ended))  # by which it is known
            os.replace(made, target)
    return target


def waiting(state: State) -> str:
    """A word for one whose turn has not come."""
    return note(f"Waiting: {state.before} before it. One training or batch goes at a time.")
