"""Whose turn it is in the studio, and what becomes of a drawing whose caller leaves, over a real loopback server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

from demo import app
from demo.request import AS_WRITTEN, NOTHING
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.access import Access
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.models import Models
from tests.serving import until
from tests.test_security import PASSWORD, asked, free_port

LOGINS = {"ann": PASSWORD, "bob": PASSWORD[::-1]}


@pytest.fixture(scope="module")
def running(tiny_model, tmp_path_factory):
    """Two studios around one engine: one for all here, one for those with a login."""
    engine = Engine(DiffusionFMPipeline.from_pretrained(tiny_model))
    with pytest.MonkeyPatch.context() as patch, Models(engine) as models:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        studios = []
        for access in (None, Access(logins=LOGINS)):
            studios.append(app.build(models))
            app.launch(studios[-1], models, free_port(), access=access)
        yield *studios, engine
        for studio in studios:
            studio.close()


class Held:
    """The engine's worker, standing still before a call until it is opened; whose pictures were in each call."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch):
        self.engine, self.reached, self.opened = engine, Event(), Event()
        self.calls: list[list[str]] = []
        step = engine._step

        def held(batch: list) -> None:
            self.reached.set()
            assert self.opened.wait(30)
            self.calls.append([picture.job.client for picture in batch])
            step(batch)

        patch.setattr(engine, "_step", held)


@pytest.fixture
def held(running, monkeypatch):
    held = Held(running[2], monkeypatch)
    yield held
    held.opened.set()
    until(lambda: held.engine.waiting == 0)


def visitor(studio, name: str = "") -> httpx.Client:
    login = (name, LOGINS[name]) if name else None
    return httpx.Client(base_url=studio.local_url, auth=login, timeout=60, trust_env=False)


def call(http: httpx.Client, session: str, count: int = 1, steps: int = 2) -> str:
    """Join the queue for /generate; the event's id."""
    data = ["a red apple", "", 0, steps, 3.0, count]
    answer = http.post("/gradio_api/call/generate", json={"data": data, "session_hash": session})
    assert answer.status_code == 200, answer.text
    return answer.json()["event_id"]


@contextmanager
def ends(http: httpx.Client, session: str) -> Iterator[Iterator[dict[str, Any]]]:
    """How the calls of a session end, one after another; at the end of the block the session hangs up."""
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        told = (json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line)
        yield (one for one in told if one["msg"] == "process_completed")


CONTROLS = ["", None, "none", 1, "a red apple", AS_WRITTEN, NOTHING, "", 7, False, 1, 3, "32 × 32", 1]


def test_many_calls_of_one_hold_up_nobody_else(running, held):
    studio, _, engine = running
    with visitor(studio) as http:
        for _ in range(72):
            call(http, "a")
        until(lambda: engine.waiting == 64)  # what one may have; the engine refuses the others at once
        with ends(http, "a") as told:
            refused = [next(told) for _ in range(8)]
            assert all("of yours are still waiting" in one["output"]["error"] for one in refused)
            call(http, "b")
            until(lambda: engine.waiting == 65)
            assert "Drawing." in asked(http, studio, "begin", "c", ["c" * 32, *CONTROLS])  # a page's event
            held.opened.set()
            with ends(http, "b") as mine:
                assert next(mine)["success"]
    assert {"127.0.0.1 b", "127.0.0.1 c"} <= {one for clients in held.calls[:3] for one in clients}


def test_a_login_is_one_whatever_tickets_and_sessions_it_makes_up(running, held):
    _, locked, engine = running
    with visitor(locked, "ann") as ann, visitor(locked, "bob") as bob:
        for k in range(8):
            call(ann, f"session{k}", count=8)
        until(lambda: engine.waiting == 64)
        call(ann, "another")
        with ends(ann, "another") as told:
            assert "64 pictures of yours" in next(told)["output"]["error"]
        begun = asked(ann, locked, "begin", "a new page", ["d" * 32, *CONTROLS])
        assert "64 pictures of yours" in begun
        call(bob, "session0")
        until(lambda: engine.waiting == 65)
        held.opened.set()
        with ends(bob, "session0") as told:
            assert next(told)["success"]


@pytest.mark.parametrize("way", ["queue/data", "call", "run"])
def test_who_hangs_up_is_drawn_for_no_longer(running, held, way):
    studio, _, engine = running
    cancelled = engine.counts.cancelled
    with visitor(studio) as http:
        if way == "run":
            body = {"data": ["a red apple", "", 0, 100, 3.0, 8]}
            with pytest.raises(httpx.ReadTimeout):
                http.post("/gradio_api/run/generate", json=body, timeout=1)
        else:
            number = call(http, "leaver", count=8, steps=100)
            path = {"queue/data": "queue/data?session_hash=leaver", "call": f"call/generate/{number}"}[way]
            with http.stream("GET", f"/gradio_api/{path}") as stream:
                assert stream.status_code == 200
                until(lambda: engine.waiting == 8)
    until(lambda: engine.waiting == 0)
    assert engine.counts.cancelled == cancelled + 8


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_grid_that_waits_leaves_the_queue_at_cancel_and_with_its_page(running, held, how, monkeypatch):
    studio, _, engine = running
    ticket = "e" * 32
    with visitor(studio) as http, ends(http, "other"):
        call(http, "other")
        assert held.reached.wait(60)
        form = ["a red apple", "seed", "0-1", "none", "", 0, 2, 3.0, "", None]
        begun = asked(http, studio, "begin", "page", [ticket, "", None, "none", 1, *form], tab="grid")
        assert "Drawing." in begun and engine.waiting == 3
        if how == "cancel":
            asked(http, studio, "cancel", "page", [ticket], tab="grid")
        else:
            monkeypatch.setattr("demo.lane.PATIENCE", -1.0)  # nobody comes back to a page that is closed
            with http.stream("GET", "/gradio_api/heartbeat/page") as beat:
                next(beat.iter_lines())
        until(lambda: engine.waiting == 1)
        assert not held.calls


def test_words_that_are_lost_or_flagged_come_as_warnings(running):
    studio, *_ = running
    prompt = "a nude " + "a red apple " * 20 + "and a walrus"
    with visitor(studio) as http:
        said = asked(http, studio, "generate", "words", [prompt, "", 0, 1, 3.0, 1])
    assert (
        said.count('"level":"warning"') >= 2
        and "walrus" in said
        and "flagged: the prompt says 'nude'" in said
    )
