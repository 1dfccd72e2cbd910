"""The security checklist, a test a line: parameters (P) and queue (Q), against a running API.

Q5's long run, 300 pictures and more, is `tests/benchmarks/serve.py --load`; here is a short one.
"""

from __future__ import annotations

import gc
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from serving import APPLE, DRAW, picture, until

from diffusionfm.cli import main
from diffusionfm.serve.jobs import Job, Limits, Request
from diffusionfm.serve.jobs import Picture as Path_

# ------------------------------------------------------------------ parameters

BAD = [
    *({"width": side} for side in (0, -8, 7, 10**9, float("nan"), "a")),
    *({"steps": steps} for steps in (0, 10**9, 1.5)),
    *({"guidance": guidance} for guidance in (float("inf"), float("nan"), -1)),
    *({"seed": seed} for seed in (-1, 2**64, 1.5)),
    *({"n": n} for n in (0, 10**6)),
    *({"prompt": prompt} for prompt in ("x" * 2**20, "a\0b", "\ud800", "")),
]


PYTHON = {"n": "num_images", "guidance": "guidance_scale", "steps": "num_inference_steps"}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:40].encode("ascii", "replace").decode())
def test_p1_bad_values_are_refused_before_the_model_runs(api, tiny_model, tmp_path, capsys, bad):
    calls = []
    hook = api.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    over_http = {"size": f"{bad['width']}x32"} if "width" in bad else bad
    body = json.dumps(APPLE | over_http).encode()
    answer = api.client.post(DRAW, content=body, headers={"Content-Type": "application/json"})
    in_python = {PYTHON.get(name, name): value for name, value in bad.items()}
    with pytest.raises((ValueError, TypeError)):
        api.pipe(**APPLE | in_python)
    hook.remove()
    assert answer.status_code in (400, 413) and not calls
    (name, value), out = next(iter(bad.items())), str(tmp_path / "a.png")
    command = ["generate", "apple", "--model", str(tiny_model), "-o", out, "--quiet"]
    command = [command[0], str(value), *command[2:]] if name == "prompt" else [*command, f"--{name}={value}"]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == 2 and capsys.readouterr().err and not Path(out).exists()


def test_p2_the_work_of_a_request_is_capped_whatever_its_parts(fresh):
    running = fresh(limits=Limits(work=32 * 32 * 10))
    assert running.draw(**APPLE, steps=5, n=2).status_code == 200
    for more in ({"steps": 11}, {"steps": 4, "n": 3}, {"steps": 3, "size": "64x64"}):
        answer = running.draw(**APPLE | more)
        assert answer.status_code == 400 and "too many for one request" in answer.json()["error"]["message"]


def test_p3_what_a_long_prompt_loses_is_told(api):
    answer = api.draw(prompt="a red apple " * 20 + "and a walrus", steps=1)
    assert any("walrus" in warning for warning in answer.json()["warnings"])


# ------------------------------------------------------------------ queue


def test_q1_a_full_queue_answers_at_once(fresh):
    running = fresh(limits=Limits(queue=3))
    with ThreadPoolExecutor(2) as pool:
        with running.held():
            others = [pool.submit(running.draw, **APPLE) for _ in range(2)]
            until(lambda: running.engine.waiting == 3)
            began = time.monotonic()
            answer = running.draw(**APPLE)
            assert answer.status_code == 429 and time.monotonic() - began < 2
            assert answer.json()["error"]["code"] == "queue_full"
        assert [other.result(60).status_code for other in others] == [200, 200]


def test_q2_cancel_stops_within_a_step_and_nobody_else_s(fresh):
    running = fresh()
    steps: dict[str, list[int]] = {"a": [], "b": []}

    def watch(name: str):
        return lambda step, *_: steps[name].append(step)

    with running.held():
        a = running.engine.submit(Request("a red apple", steps=400), "a", watch("a"))
        b = running.engine.submit(Request("a blue fish", steps=3), "b", watch("b"))
        a.cancel()
    assert b.result(60).images and steps["a"] in ([], [1]) and max(steps["b"]) == 3
    assert running.engine.waiting == 0 and running.draw(**APPLE).status_code == 200


def test_q3_who_hangs_up_is_drawn_for_no_longer(fresh):
    running = fresh()
    body = json.dumps(APPLE | {"steps": 400}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as caller:
        caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.engine.counts.steps >= 2)
    until(lambda: running.engine.counts.cancelled == 1)
    assert running.engine.waiting == 0 and running.engine.counts.steps < 400


def test_q4_a_failure_is_told_kindly_and_stays_alone(fresh):
    running = fresh()
    marked = running.pipe.noise([666], 32, 32)[0]

    def fail(network, args):
        if any(torch.equal(row, marked) for row in args[0]):
            raise torch.OutOfMemoryError("secret internals")

    running.pipe.transformer.register_forward_pre_hook(fail)
    answer = running.draw(**APPLE, seed=666)
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
    assert running.client.get("/health").status_code == 200 and running.draw(**APPLE).status_code == 200


def kept() -> set[int]:
    """The jobs and paths in memory, those of other tests' engines among them."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, (Job, Path_))}


def test_q5_nothing_is_kept_of_what_was_drawn(fresh):
    running = fresh()
    running.draw(**APPLE)
    before, others = psutil.Process().num_fds(), kept()
    for seed in range(40):
        assert running.draw(**APPLE, seed=seed, steps=1, n=2).status_code == 200
    until(lambda: running.engine.waiting == 0)
    assert psutil.Process().num_fds() <= before + 1
    assert kept() <= others


def test_q6_each_of_many_gets_its_own(api, tiny_pipe):
    asked = [{"prompt": f"a {thing}", "seed": k, "steps": 2 + k % 3} for k, thing in enumerate("abcdefgh")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: api.draw(**body), asked))
    for body, answer in zip(asked, answers, strict=True):
        alone = tiny_pipe(body["prompt"], seed=body["seed"], num_inference_steps=body["steps"]).images[0]
        found = picture(answer.json()["data"][0])
        assert max(abs(a - b) for a, b in zip(found.tobytes(), alone.tobytes(), strict=True)) <= 1


def test_q8_one_waits_for_no_more_than_one_of_another_s_fifty(fresh):
    running, order = fresh(limits=Limits(batch=1)), []
    with running.held("a"):
        many = [running.engine.submit(Request("a red apple", seed=k, steps=2), "a") for k in range(50)]
        one = running.engine.submit(Request("a blue fish", steps=2), "b")
        for name, future in [*(("a", future) for future in many), ("b", one)]:
            future.add_done_callback(lambda _, name=name: order.append(name))
    until(lambda: len(order) == 51)
    assert order.index("b") <= 1
