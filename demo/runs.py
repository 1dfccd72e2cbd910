"""Long runs of the library's commands, one at a time: processes in people's own folders, which outlive a page.

ROOT/PERSON/KEY/ holds run.json (what was asked for), state.json (how it ended), log.txt, errors.txt, and what the
run reads and makes; its commands run inside of it. PERSON is the hash of a secret that only a browser knows, so nobody
finds another's runs, and no path tells the secret.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionfm.images import write_atomic
from diffusionfm.serve.gate import has_room
from diffusionfm.serve.jobs import Attempt
from diffusionfm.serve.turns import Turns

from .processes import PATIENCE, Command, begun, end, is_locked

ROOT = Path("runs/studio")
MOST_RUNS = 40  # that a person may keep
MOST_WAITING, MOST_WAITING_EACH = 20, 3  # of all people, and of one
MOST_BYTES = 20 * 2**30  # of all runs of all people


def new_person() -> str:
    """A secret to know a browser by."""
    return secrets.token_hex(16)


def is_person(text: Any) -> bool:
    """Whether a text can be such a secret: nothing else becomes part of a path."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) is not None


def hidden(person: str) -> str:
    """What a person's folder is called: the secret cannot be told from it, nor does it stand for the secret."""
    return hashlib.sha256(person.encode()).hexdigest()


_keeping = threading.Lock()


@dataclass(frozen=True)
class Run:
    """A run and its folder."""

    folder: Path

    @property
    def key(self) -> str:
        """Its name among a person's runs."""
        return self.folder.name

    @property
    def person(self) -> str:
        """Whose it is, `hidden`."""
        return self.folder.parent.name

    @property
    def slug(self) -> str:
        """Its name for files."""
        return self.key.rpartition("-")[0]

    @property
    def out(self) -> Path:
        """Where the command writes: a folder of the run's name, which an adapter takes from it."""
        return self.folder / "made" / self.slug

    def inside(self, path: Path) -> str:
        """A path of its folder as its commands are told it."""
        return str(path.relative_to(self.folder))

    @property
    def facts(self) -> dict[str, Any]:
        """What it is: kind, name, created, and whatever the tab put there."""
        return _read(self.folder / "run.json")

    def keep(self, **facts: Any) -> None:
        """Add to the facts."""
        with _keeping:
            _write(self.folder / "run.json", self.facts | facts)

    @property
    def ended(self) -> int:
        """When it ended, in nanoseconds; 0 where it has not, or nobody saw it."""
        state = self.folder / "state.json"
        return state.stat().st_mtime_ns if state.is_file() else 0

    @property
    def said(self) -> str:
        """The last line that the command said."""
        lines = _tail(self.folder / "log.txt")
        return lines[-1] if lines else ""

    @property
    def problem(self) -> str:
        """Why it failed, in the command's words."""
        lines = _tail(self.folder / "errors.txt")
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (told or lines or ["it ended without a word"])[-1]


@dataclass(frozen=True)
class State:
    """How a run fares: draft, waiting, running, stopping, done, stopped or failed; before: runs that go first."""

    word: str
    before: int = 0

    @property
    def busy(self) -> bool:
        """Whether it will change by itself."""
        return self.word in ("waiting", "running", "stopping")


@dataclass(frozen=True, order=True)
class Place:
    """A run's in the lane: its number, and whose turn it takes."""

    number: float
    turn: str = field(compare=False)


class Runs:
    """All runs below a folder, and the lane in which one after the other goes, people taking turns."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self._turns, self._now = Turns(), 0.0  # the number of the run that had its turn last
        self._waiting: dict[Run, Place] = {}  # in the order of their coming
        self._current: Run | None = None
        self._is_begun = self._is_stopped = False  # of the current one
        self._changed = threading.Condition()
        self._closing = False
        self._worker: threading.Thread | None = None

    # -------------------------------------------------------------- what there is

    def new(self, person: str, kind: str, name: str) -> Run:
        """A new run of a person. ValueError when they keep too many already, or there is no room on the disk."""
        if len(self.all(person)) >= MOST_RUNS:
            raise ValueError(f"you keep {MOST_RUNS} runs already: delete one that you no longer need")
        if not has_room(self.root, 0, MOST_BYTES):
            raise ValueError(
                "there is no room on the disk for another run: delete one that you no longer need"
            )
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or kind
        run = Run(self._home(person) / f"{slug}-{secrets.token_hex(4)}")
        self.root.mkdir(
            parents=True, exist_ok=True, mode=0o700
        )  # one that is there is somebody's, and stays as it is
        for folder in (run.folder.parent, run.folder):
            _shut(folder)
        run.keep(kind=kind, name=name.strip()[:60] or kind, created=time.time())
        return run

    def all(self, person: str, kind: str = "") -> list[Run]:
        """A person's runs, the latest first; of one kind alone where that is given."""
        if not is_person(person) or not self._home(person).is_dir():
            return []
        runs = [Run(path) for path in self._home(person).iterdir() if not path.name.startswith(".")]
        told = [(facts["created"], run) for run in runs if _fits(facts := run.facts, kind)]
        return [run for _, run in sorted(told, key=lambda one: -one[0])]

    def get(self, person: str, kind: str, key: str | None) -> Run | None:
        """That run of that person."""
        return next((run for run in self.all(person, kind) if run.key == key), None)

    def delete(self, run: Run) -> None:
        """Remove a run and all that it made. ValueError while it goes on."""
        with self._changed:  # so that nobody starts it meanwhile
            if self.state(run).busy:
                raise ValueError("stop it first")
            run.folder.rename(run.folder.with_name(f".{run.key}"))
        for gone in run.folder.parent.glob(".*"):  # of a studio that ended meanwhile too
            shutil.rmtree(gone, ignore_errors=True)

    def _home(self, person: str) -> Path:
        if not is_person(person):
            raise ValueError("this page does not know whose it is: load it again")
        home, old = (self.root / hidden(person)).resolve(), (self.root / person).resolve()
        if old.is_dir():
            with self._changed:
                _move(old, home)
        return home

    # -------------------------------------------------------------- the lane

    def start(self, run: Run, commands: list[Command], turn: str = "") -> None:
        """Queue the commands of a run, arguments of `diffusionfm`; the same again takes up one that was stopped.

        turn: whose place and turn it takes; "" for the person's own."""
        turn = turn or run.person
        with self._changed:
            if not run.folder.is_dir():
                raise ValueError("it was deleted meanwhile: begin another")
            if self.state(run).busy or self._closing:
                raise ValueError("it is under way already")
            if len(self._waiting) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} trainings and batches are waiting: try again later")
            if sum(place.turn == turn for place in self._waiting.values()) >= MOST_WAITING_EACH:
                raise ValueError(
                    f"{MOST_WAITING_EACH} of yours are waiting already: start it once one has its turn"
                )
            run.keep(commands=commands)
            (run.folder / "state.json").unlink(missing_ok=True)
            self._waiting[run] = Place(self._turns.take(turn, 1.0, self._now), turn)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="runs", daemon=True)
                self._worker.start()
            self._changed.notify()

    def stop(self, run: Run) -> None:
        """Stop a run, so that it can be taken up again."""
        with self._changed:
            if run in self._waiting:
                del self._waiting[run]
                _write(run.folder / "state.json", {"word": "stopped"})
            elif run == self._current:
                self._is_stopped = True
                if self._is_begun:
                    end(run.folder)
            elif self.state(run).word == "running":  # begun by a studio that is gone
                end(run.folder)

    def state(self, run: Run) -> State:
        """How a run fares."""
        with self._changed:
            if run == self._current:
                return State("stopping" if self._is_stopped else "running")
            if run in self._waiting:
                return State("waiting", self._in_turn().index(run) + (self._current is not None))
        if is_locked(run.folder):
            return State("running")
        told = _read(run.folder / "state.json").get("word")
        return State(told or ("stopped" if "commands" in run.facts else "draft"))

    def company(self) -> str:
        """A word for those who draw meanwhile; "" when nothing is under way."""
        run = self._current
        if run is None:
            return ""
        what = "A training is" if run.facts.get("kind") == "finetune" else "A batch is"
        return f"{what} under way: it steps back for drawings, which still take longer."

    def close(self) -> None:
        """Stop what is under way; it can be taken up when the studio is opened again."""
        with self._changed:
            self._closing = True
            for run in [*self._waiting, *([self._current] if self._current else [])]:
                self.stop(run)
            self._changed.notify()
        if self._worker is not None:
            self._worker.join(PATIENCE + 5)

    def _in_turn(self) -> list[Run]:
        return sorted(self._waiting, key=self._waiting.__getitem__)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current, self._is_begun, self._is_stopped = None, False, False
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                run = self._current = self._in_turn()[0]
                self._now = self._waiting.pop(run).number
            word = "failed"
            with Attempt() as attempt:  # whatever is wrong with one must not end the lane for all
                word = self._go(run)
            if attempt.error is not None:
                traceback.print_exception(attempt.error)
                with suppress(OSError), open(run.folder / "errors.txt", "a", encoding="utf-8") as file:
                    file.write(
                        f"error: it could not be run: {attempt.error or type(attempt.error).__name__}\n"
                    )
            with self._changed:
                word = "stopped" if self._is_stopped and word != "done" else word
            try:
                _write(run.folder / "state.json", {"word": word})
            except OSError:  # the disk is full
                traceback.print_exc()

    def _go(self, run: Run) -> str:
        for command in run.facts["commands"]:
            process = begun(run.folder, command)
            with self._changed:
                self._is_begun = True
                if self._is_stopped:
                    end(run.folder)
            code = process.wait()
            with self._changed:
                self._is_begun = False
            if code or self._is_stopped:
                return "failed"
        return "done"


# ------------------------------------------------------------------ small files


def _read(path: Path) -> dict[str, Any]:
    """What a file tells; nothing where there is none, or a broken one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fits(facts: dict[str, Any], kind: str) -> bool:
    """Whether these are the facts of a run, and of that kind where one is given."""
    whole = isinstance(facts.get("created"), int | float) and "name" in facts
    return whole and kind in ("", facts.get("kind"))


def _shut(folder: Path) -> None:
    """See to a folder that its owner alone may look into."""
    folder.mkdir(exist_ok=True, mode=0o700)
    with suppress(PermissionError):  # it is another's, who lends it
        os.chmod(folder, 0o700)


def _move(old: Path, home: Path) -> None:
    """Move a person's runs from a folder that an older studio named by the secret, which their files tell no more."""
    _shut(home)
    for folder in old.iterdir():
        if is_locked(folder):
            continue  # it goes on there
        for name in ("run.json", "made/*/config.yaml", "made/*/report.html"):
            for file in folder.glob(name):
                write_atomic(file, file.read_bytes().replace(old.name.encode(), home.name.encode()))
        for packed in folder.glob("*.zip"):
            packed.unlink()  # it is packed again
        folder.rename(home / folder.name)
    with suppress(OSError):
        old.rmdir()


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value).encode())


def _tail(path: Path, size: int = 4096) -> list[str]:
    """The last lines of a file that is not blank, without what a progress bar wrote over."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        text = file.read().decode("utf-8", "replace")
    lines = (line.split("\r")[-1].strip() for line in text.splitlines())
    return [line for line in lines if line]
