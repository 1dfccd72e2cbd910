"""How requests to the engine end other than drawn: cancelled, failed alone, or shut down; and what is kept: nothing."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import CancelledError

import pytest
import torch
from serving import Gate, all_near, near

from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, Limits, Request

LONG = 500  # steps of a request that is still drawing when the next one comes


# ------------------------------------------------------------------ cancelling


def test_cancel_stops_within_a_step_and_touches_nobody_else(engine, tiny_pipe):
    gate = Gate(at=3)
    mine = engine.submit(Request("a red apple", steps=LONG), "a", gate)
    yours = engine.submit(Request("fish", seed=4, steps=20), "b")
    assert gate.reached.wait(60)
    assert mine.cancel()
    gate.opened.set()
    with pytest.raises(CancelledError):
        mine.result(60)
    expected = tiny_pipe("fish", seed=4, num_inference_steps=20).images[0]
    assert near(yours.result(60).images[0], expected)
    assert gate.steps == [1, 2, 3]
    assert engine.counts.steps <= 3 + 1 + 20 and engine.counts.cancelled == 1 and engine.waiting == 0


def test_looking_on_may_cancel(engine):
    steps = []
    future = engine.submit(
        Request("fish", steps=LONG), on_step=lambda step, *_: steps.append(step) or step == 2
    )
    with pytest.raises(CancelledError):
        future.result(60)
    assert steps == [1, 2]


# ------------------------------------------------------------------ failing


class Impolite(Exception):
    """What nobody expects of an `on_step`."""


def impolite(*_):
    raise Impolite


def test_a_request_that_fails_leaves_the_others_whole(pipe, tiny_pipe):
    """A call is refused by the network whenever one row is there: only that row's request fails."""
    marked = pipe.noise([666], 32, 32)[0]

    def refuse(network, args):
        if any(torch.equal(row, marked) for row in args[0]):
            raise RuntimeError("no such picture")

    pipe.transformer.register_forward_pre_hook(refuse)
    gate = Gate()
    with Engine(pipe) as engine:
        held = engine.submit(Request("yellow star", steps=2), "z", gate)
        assert gate.reached.wait(60)
        good = [engine.submit(Request("fish", seed=k, steps=4), str(k)) for k in range(5)]
        bad = engine.submit(Request("a red apple", seed=666), "bad")
        rude = engine.submit(Request("a red apple"), "rude", impolite)
        gate.opened.set()
        with pytest.raises(RuntimeError, match="no such picture"):
            bad.result(60)
        with pytest.raises(Impolite):
            rude.result(60)
        expected = [tiny_pipe("fish", seed=k, num_inference_steps=4).images[0] for k in range(5)]
        assert all_near([future.result(60).images[0] for future in good], expected)
        assert held.result(60).images and engine.alive and engine.counts.failed == 2


def test_too_large_a_call_is_cut_and_stays_cut(pipe, tiny_pipe):
    rows = []

    def refuse(network, args):
        rows.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")

    pipe.transformer.register_forward_pre_hook(refuse)
    with Engine(pipe, Limits(batch=8)) as engine:
        images = engine.submit(Request("fish", num_images=8, steps=3)).result(60).images
    expected = tiny_pipe("fish", num_images=8, num_inference_steps=3).images
    assert all_near(images, expected)
    assert sum(count > 4 for count in rows) <= 3


def test_numbers_that_overflow_fail_their_own_request(pipe):
    bad = pipe.noise([666], 32, 32)[0]

    def spoil(network, args):
        x, *others = args
        hit = torch.tensor([torch.equal(row, bad) for row in x])
        return (torch.where(hit[:, None, None, None], torch.inf, x), *others)

    pipe.transformer.register_forward_pre_hook(spoil)
    with Engine(pipe) as engine:
        good, spoiled = engine.submit(Request("fish")), engine.submit(Request("fish", seed=666))
        assert good.result(60).images
        with pytest.raises(FloatingPointError, match="not finite"):
            spoiled.result(60)


# ------------------------------------------------------------------ the end


def test_closing_draws_what_is_queued_and_takes_no_more(pipe):
    gate = Gate()
    engine = Engine(pipe)
    futures = [engine.submit(Request("fish", num_images=2), "a", gate), engine.submit(Request("a red apple"))]
    assert gate.reached.wait(60)
    engine.refuse()
    assert not engine.alive
    with pytest.raises(Closed, match="shutting down"):
        engine.submit(Request("fish"))
    gate.opened.set()
    engine.close()
    assert [len(future.result(0).images) for future in futures] == [2, 1]


def test_closing_in_haste_fails_the_rest_clearly(pipe):
    gate = Gate()
    engine = Engine(pipe)
    future = engine.submit(Request("fish", steps=LONG), "a", gate)
    assert gate.reached.wait(60)
    gate.opened.set()
    engine.close(timeout=0)
    with pytest.raises(Closed, match="before these pictures"):
        future.result(0)
    assert gate.steps[-1] < LONG


def test_nothing_is_kept_of_what_was_drawn(engine):
    future = engine.submit(Request("a red apple"), on_step=Gate(at=99))
    pictures = weakref.ref(future.result(60))
    del future
    deadline = time.monotonic() + 30
    while pictures() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert pictures() is None


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_cycles_are_collected_while_it_serves(engine, seconds):
    """A job, its pictures and its future are a cycle: with the automatic collector off, only the engine frees them."""
    engine._tidy.seconds = seconds
    gc.disable()
    try:
        kept = weakref.ref(engine.submit(Request("fish", steps=2)).result(60))
        for _ in range(3):  # the first of them is delivered before the engine is done with the one above
            engine.submit(Request("fish", steps=2)).result(60)
        assert (kept() is None) == (seconds == 0.0)
    finally:
        gc.enable()
