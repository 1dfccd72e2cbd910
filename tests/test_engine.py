"""The engine: pictures that join and leave, turns, limits, cancelling, failing, shutting down."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionfm.edit import start_from
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, Limits, QueueFull, Request
from diffusionfm.serve.turns import Turns

LONG = 500  # steps of a request that is still drawing when the next one comes


@pytest.fixture
def pipe(tiny_model):
    """A pipeline of the test's own: an engine owns its networks."""
    return DiffusionFMPipeline.from_pretrained(tiny_model)


@pytest.fixture
def engine(pipe):
    with Engine(pipe) as engine:
        yield engine


class Gate:
    """An `on_step` that stops the worker after a step until it is opened, and notes the steps."""

    def __init__(self, at: int = 1):
        self.at, self.steps = at, []
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step, total, preview):
        self.steps.append(step)
        if step >= self.at:
            self.reached.set()
            assert self.opened.wait(60)


def near(a, b) -> bool:
    return abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def all_near(some, others) -> bool:
    return all(near(a, b) for a, b in zip(some, others, strict=True))


# ------------------------------------------------------------------ pictures


APPLE = Image.radial_gradient("L").resize((32, 32)).convert("RGBA")
HALF = Image.new("L", (32, 32))
HALF.paste(255, (16, 0, 32, 32))
MIXED = [
    Request("a red apple", seed=5, num_images=2, steps=9),
    Request("yellow star, naïve, sketch of a house", "a blue fish", seed=7, steps=4, guidance=6.0),
    Request("fish", seed=2**40, steps=6, guidance=1.0),
    Request("fish", seed=3, steps=5, guidance=0.0),
    Request("a smiling face on white", "white", seed=8, steps=3, guidance=0.4),
    Request("a red apple", seed=6, steps=7, width=48),
    Request("yellow star", seed=9, steps=8, num_images=2, start=start_from(APPLE, 32, 32, 0.5)),
    Request("fish", seed=9, steps=8, start=start_from(APPLE, 32, 32, 0.8, HALF)),
    Request("", seed=1, steps=5, start=start_from(APPLE, 32, 32, 0.6)),
]


def alone(pipe, request: Request):
    return pipe(
        request.prompt,
        request.negative_prompt,
        num_images=request.num_images,
        seed=request.seed,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        height=request.height,
        width=request.width,
        image=request.start and request.start.picture,
        mask_image=request.start and request.start.mask,
        strength=request.start and request.start.strength,
    )


def test_pictures_that_share_calls_are_those_drawn_alone(pipe, tiny_pipe):
    gate = Gate()
    with Engine(pipe) as engine:
        first = engine.submit(MIXED[0], on_step=gate)
        assert gate.reached.wait(60)
        rest = [engine.submit(request, client=str(k)) for k, request in enumerate(MIXED[1:])]
        gate.opened.set()
        drawn = [future.result(60) for future in [first, *rest]]
        steps = sum(
            math.ceil(request.steps * (request.start.strength if request.start else 1)) * request.num_images
            for request in MIXED
        )
        assert engine.counts.steps == steps and engine.counts.calls < steps / 2  # they did share
        assert engine.waiting == 0 and engine.counts.pictures == 11
    for request, pictures in zip(MIXED, drawn, strict=True):
        expected = alone(tiny_pipe, request)
        assert pictures.seeds == expected.seeds and not pictures.warnings
        assert all_near(pictures.images, expected.images)


def test_a_u_net_shares_calls_as_well(pipe):
    from diffusionfm.unet import DiffusionUNet

    torch.manual_seed(0)
    network = DiffusionUNet(
        in_channels=4, widths=(32, 64), blocks=1, text_dim=16, text_width=32, condition_dim=32, grid=4
    )
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    pipe.register_modules(transformer=network.eval())
    expected = [alone(pipe, request) for request in MIXED]
    with Engine(pipe) as engine:
        drawn = [engine.submit(request, str(k)) for k, request in enumerate(MIXED)]
        assert all(
            all_near(future.result(60).images, pictures.images)
            for future, pictures in zip(drawn, expected, strict=True)
        )


def test_a_long_prompt_is_reported(engine):
    (warning,) = engine.submit(Request("a red apple " * 30 + "zebra", num_images=2)).result(60).warnings
    assert "zebra" in warning


def test_looks_on_the_way_may_be_taken_later_and_the_last_is_the_picture(engine):
    looks = []
    future = engine.submit(
        Request("yellow star", num_images=2, steps=6), on_step=lambda *call: looks.append(call) and None
    )
    images = future.result(60).images
    assert [(step, total) for step, total, _ in looks] == [(k, 6) for k in range(1, 7)]
    assert len(looks[0][2]()) == 2 and not near(looks[0][2]()[0], images[0])
    assert all_near(looks[-1][2](), images)


# ------------------------------------------------------------------ turns


def test_turns_go_round():
    turns = Turns()
    many = [turns.take("a", 1.0, now=0.0) for _ in range(50)]
    one = turns.take("b", 1.0, now=many[0])
    assert sorted([*many, one]).index(one) <= 1
    assert turns.take("b", 1.0, now=many[0]) == many[1]
    assert turns.take("c", 1.0, now=30.0) == 30.0  # no credit for having been away


def test_who_asks_for_many_does_not_keep_others_waiting(pipe):
    gate, order = Gate(), []
    with Engine(pipe, Limits(batch=1)) as engine:
        many = [
            engine.submit(Request("a red apple", seed=k), "a", gate if k == 0 else None) for k in range(20)
        ]
        assert gate.reached.wait(60)
        one = engine.submit(Request("a blue fish"), "b")
        for name, future in [*((f"a{k}", future) for k, future in enumerate(many)), ("b", one)]:
            future.add_done_callback(lambda _, name=name: order.append(name))
        gate.opened.set()
    assert order.index("b") <= 1 and len(order) == 21


def test_a_newcomer_joins_a_full_call_at_the_next_step(pipe):
    gate, calls = Gate(), []
    with Engine(pipe, Limits(batch=2)) as engine:
        many = engine.submit(Request("a red apple", num_images=6, steps=50), "a", gate)
        assert gate.reached.wait(60)
        held = engine.counts.calls
        one = engine.submit(Request("fish", steps=3), "b", lambda *_: calls.append(engine.counts.calls))
        gate.opened.set()
        one.result(60)
        assert calls == [held + 1, held + 2, held + 3] and not many.done()
        assert len(many.result(60).images) == 6


# ------------------------------------------------------------------ limits


def test_a_full_queue_answers_at_once_and_the_others_finish(pipe):
    gate = Gate()
    with Engine(pipe, Limits(queue=4, client=3)) as engine:
        first = engine.submit(Request("a red apple", num_images=3), "a", gate)
        assert gate.reached.wait(60)
        with pytest.raises(QueueFull, match="3 pictures of yours"):
            engine.submit(Request("fish"), "a")
        second = engine.submit(Request("fish"), "b")
        with pytest.raises(QueueFull, match="queue is full") as caught:
            engine.submit(Request("fish"), "c")
        assert caught.value.retry_after >= 0
        gate.opened.set()
        assert len(first.result(60).images) == 3 and second.result(60).images
        assert engine.submit(Request("fish"), "c").result(60).images


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"steps": 10**6}, "steps must be"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"width": 100}, "try 96"),
        ({"num_images": 0}, "number of images"),
        ({"num_images": 9}, "at most 8 pictures a request"),
        ({"width": 1024, "height": 1024, "steps": 65}, "fewer pictures or steps"),
        ({"loras": (("../../etc/passwd", 1.0),)}, "no LoRA"),
    ],
)
def test_absurd_requests_are_refused_before_any_network_call(pipe, bad, words):
    with Engine(pipe, Limits(client=8)) as engine:
        with pytest.raises(ValueError, match=words):
            engine.submit(Request(**{"prompt": "a red apple", **bad}))
        assert engine.counts.calls == 0 and engine.waiting == 0


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


# ------------------------------------------------------------------ LoRAs


def test_requests_with_other_loras_take_calls_in_turn(tiny_model, tiny_pipe, tmp_path):
    folders = [write_lora(tiny_model, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    wanted = [(), (("one", 1.0),), (("two", 0.5),), (("one", 0.5), ("two", 1.0))]
    expected = []
    for loras in wanted:
        plain = DiffusionFMPipeline.from_pretrained(tiny_model)
        for name, scale in loras:
            plain.load_lora(tmp_path / name, scale)
        expected.append(plain("a red apple", seed=1, num_inference_steps=5).images[0])
    pipe, gate = DiffusionFMPipeline.from_pretrained(tiny_model), Gate()
    for folder in folders:
        pipe.load_lora(folder)
    with Engine(pipe) as engine:
        held = engine.submit(Request("fish", steps=2), "z", gate)
        assert gate.reached.wait(60)
        futures = [
            engine.submit(Request("a red apple", seed=1, steps=5, loras=loras))
            for loras in wanted
            for _ in "ab"
        ]
        gate.opened.set()
        drawn = [future.result(60).images[0] for future in futures]
        assert held.result(60)
        assert engine.counts.calls <= 5 * len(wanted) + 2
    assert all_near(drawn[::2], expected) and all_near(drawn[1::2], expected)
    assert len({image.tobytes() for image in expected}) == 4


def test_a_dora_leaves_the_layer_s_own_magnitudes_behind(tiny_model, tiny_pipe, tmp_path):
    folder = write_lora(tiny_model, tmp_path / "dora", 3, use_dora=True)
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    pipe.load_lora(folder)
    expected = pipe("a red apple", seed=1).images[0]
    bare = tiny_pipe("a red apple", seed=1).images[0]
    with Engine(pipe) as engine:
        for loras, image in (((), bare), ((("dora", 1.0),), expected), ((("dora", 0.0),), bare)):
            drawn = engine.submit(Request("a red apple", seed=1, loras=loras)).result(60)
            assert near(drawn.images[0], image)
    assert not near(bare, expected)


def write_lora(model, folder, seed, **options):
    """A LoRA of random weights for the tiny pipeline, as finetune writes one."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["qkv", "text_kv"], init_lora_weights=False, **options
    )
    network = inject_adapter_in_model(config, DiffusionFMPipeline.from_pretrained(model).transformer)
    for name, parameter in network.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(network)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


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


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_added_while_others_draw_is_the_one_loaded_before(
    dora, tiny_model, tiny_pipe, tmp_path, monkeypatch
):
    folders = [write_lora(tiny_model, tmp_path / f"l{k}", k, use_dora=dora and k != 1) for k in range(4)]
    expected = []
    for folder in folders:
        plain = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
        plain.load_lora(folder)
        expected.append(plain("a red apple", seed=1, num_inference_steps=5).images[0])
    bare = tiny_pipe("a red apple", seed=1, num_inference_steps=5).images[0]
    assert not near(expected[3], bare)
    monkeypatch.setattr("diffusionfm.serve.wardrobe.MOST_PRIVATE", 2)
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    pipe.load_lora(folders[0])
    gate = Gate()
    with Engine(pipe) as engine:
        first = engine.submit(Request("a red apple", seed=1, steps=5), on_step=gate)
        assert gate.reached.wait(60)
        threads = [threading.Thread(target=engine.add_lora, args=(folders[k], f"p{k}")) for k in (1, 2)]
        for thread in threads:
            thread.start()
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert near(first.result(60).images[0], bare)
        engine.add_lora(folders[1], "p1")  # again: nothing but used last
        engine.add_lora(folders[3], "p3")
        assert engine.wardrobe.private == ["p1", "p3"] and list(pipe.loras) == ["l0"]
        with pytest.raises(ValueError, match="no LoRA 'p2' here: l0$"):
            engine.submit(Request("x", loras=(("p2", 1.0),)))
        for name, k in (("p1", 1), ("l0", 0), ("p3", 3), ("p1", 1)):
            drawn = engine.submit(Request("a red apple", seed=1, steps=5, loras=((name, 1.0),)))
            assert near(drawn.result(60).images[0], expected[k]), name
        assert near(engine.submit(Request("a red apple", seed=1, steps=5)).result(60).images[0], bare)
        with pytest.raises(ValueError, match="no LoRA folder"):
            engine.add_lora(tmp_path / "nowhere", "p9")
    with pytest.raises(Closed):
        engine.add_lora(folders[2], "p2")
