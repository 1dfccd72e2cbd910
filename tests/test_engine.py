"""The engine: pictures that join and leave a call, turns and limits."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from serving import Gate, all_near, near

from diffusionfm.edit import start_from
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Limits, QueueFull, Request
from diffusionfm.serve.turns import Turns

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
        assert pictures.told == expected.told and all(told["model_hash"] for told in pictures.told)
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
