"""The HTTP API on loopback with a real tiny model: what it answers, in which order, and how it ends."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import APPLE, DRAW, KEY, near, picture, until, write_lora

from diffusionfm.images import read_parameters
from diffusionfm.serve.access import Rate
from diffusionfm.serve.jobs import Limits

# ------------------------------------------------------------------ what it answers


def test_the_official_client_draws(api, tiny_pipe):
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)
    ours = {"negative_prompt": "a blue fish", "steps": 4, "guidance": 2.5, "seed": 11}
    answer = client.images.generate(
        model="tiny",
        prompt="a red apple",
        n=2,
        size="48x32",
        background="transparent",
        output_format="png",
        user="me",
        extra_body=ours,
    )
    expected = tiny_pipe(
        "a red apple",
        "a blue fish",
        num_images=2,
        seed=11,
        num_inference_steps=4,
        guidance_scale=2.5,
        width=48,
        height=32,
    )
    assert [entry.seed for entry in answer.data] == [11, 12] and answer.size == "48x32"
    for entry, image in zip(answer.data, expected.images, strict=True):
        data = base64.b64decode(entry.b64_json)
        with Image.open(io.BytesIO(data)) as found:
            assert found.mode == "RGBA" and near(found, image)
        parameters = read_parameters(io.BytesIO(data))
        assert parameters["prompt"] == "a red apple" and parameters["seed"] == entry.seed
        assert parameters["negative_prompt"] == "a blue fish" and parameters["guidance"] == 2.5
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.BadRequestError, match="steps must be") as caught:
        client.images.generate(prompt="a red apple", extra_body={"steps": 0})
    assert caught.value.param == "steps"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_without_a_seed_pictures_differ_and_their_seeds_draw_them_again(api):
    one, two = (api.draw(**APPLE).json()["data"][0] for _ in range(2))
    assert one["seed"] != two["seed"] and one["b64_json"] != two["b64_json"]
    again = api.draw(**APPLE, seed=one["seed"]).json()["data"][0]
    assert again["b64_json"] == one["b64_json"]


def test_metadata_and_background_are_the_caller_s_choice(api):
    bare = picture(api.draw(**APPLE, metadata=False).json()["data"][0])
    assert bare.info == {} and bare.mode == "RGBA"
    opaque = picture(api.draw(**APPLE, background="opaque").json()["data"][0])
    assert opaque.getchannel("A").getextrema() == (255, 255)


def test_a_prompt_that_is_cut_is_said(api):
    (warning, *_) = api.draw(prompt="a red apple " * 30 + "zebra").json()["warnings"]
    assert "zebra" in warning


def test_eight_at_once_each_get_their_own(api, tiny_pipe):
    asked = [
        {"prompt": prompt, "seed": 10 * k, "steps": 3 + k % 3, "user": str(k)}
        for k, prompt in enumerate(["a red apple", "a blue fish", "yellow star", "a house"] * 2)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: api.draw(**body).json(), asked))
    for body, answer in zip(asked, answers, strict=True):
        expected = tiny_pipe(body["prompt"], seed=body["seed"], num_inference_steps=body["steps"])
        assert answer["data"][0]["seed"] == body["seed"]
        assert near(picture(answer["data"][0]), expected.images[0])


def test_health_and_metrics(api):
    assert api.client.get("/health").json() == {"status": "ok"}
    before, after = figures(api), (api.draw(**APPLE, n=2), figures(api))[1]
    drawn = ("diffusionfm_pictures_total", "drawn")
    assert after[drawn] == before[drawn] + 2
    assert (
        after["diffusionfm_generation_seconds_count",] == before["diffusionfm_generation_seconds_count",] + 1
    )
    assert after["diffusionfm_waiting_pictures",] == 0 and after["diffusionfm_network_calls_total",] > 0


def figures(api) -> dict:
    families = text_string_to_metric_families(api.client.get("/metrics").text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_nothing_lists_or_keeps_pictures(api):
    paths = {route.path for route in api.service.routes()}
    edits = {"/v1/images/edits", "/v1/images/variations"}
    assert paths == {DRAW, *edits, "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
    assert api.draw(**APPLE).headers["cache-control"] == "no-store"


# ------------------------------------------------------------------ LoRAs


def test_a_lora_is_asked_for_by_its_name(api, tiny_model, tmp_path, fresh):
    folder = write_lora(tiny_model, tmp_path / "my-style", seed=0)
    running = fresh(loras=[(folder, 0.5)])
    body = APPLE | {"seed": 1}
    plain, half, more = (running.draw(**body, lora=lora) for lora in (None, "my-style", ["my-style:1.5"]))
    assert picture(plain.json()["data"][0]).tobytes() == picture(api.draw(**body).json()["data"][0]).tobytes()
    pngs = [answer.json()["data"][0]["b64_json"] for answer in (plain, half, more)]
    assert len({*pngs}) == 3
    told = [read_parameters(io.BytesIO(base64.b64decode(png))).get("lora") for png in pngs]
    assert told == [None, ["my-style:0.5"], ["my-style:1.5"]]
    assert running.client.get("/v1/models").json()["data"][0]["loras"] == ["my-style"]
    assert running.draw(**body, lora="my-style:9").status_code == 400


# ------------------------------------------------------------------ queue, rates, hanging up


def test_a_full_queue_answers_at_once_with_when_to_come_back(fresh):
    running = fresh(limits=Limits(queue=2))
    with running.held():
        first = ThreadPoolExecutor(1).submit(running.draw, **APPLE)
        until(lambda: running.engine.waiting == 2)
        full = running.draw(**APPLE)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
    assert first.result(60).status_code == 200
    assert running.draw(**APPLE).status_code == 200


def test_a_caller_may_ask_only_so_often(fresh):
    running = fresh(per_minute=2)
    assert [running.draw(**APPLE).status_code for _ in range(3)] == [200, 200, 429]
    assert int(running.draw(**APPLE).headers["retry-after"]) <= 30


def test_rates_refill_and_forget():
    now = [0.0]
    rate = Rate(60, clock=lambda: now[0])
    assert not any(rate.take("a") for _ in range(60))
    assert rate.take("a") == pytest.approx(1.0) and rate.take("b") == 0
    now[0] = 1.0
    assert rate.take("a") == 0 and rate.take("a") > 0
    for k in range(5000):
        rate.take(str(k))
    assert len(rate._left) <= 4096


def test_hanging_up_frees_the_place_within_a_step(fresh):
    running = fresh()
    body = json.dumps(APPLE | {"steps": 500, "n": 4}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with running.held(), socket.create_connection(("127.0.0.1", running.port)) as caller:
        caller.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: running.engine.waiting == 5)
        caller.close()
        until(lambda: running.engine.counts.cancelled == 4)
    assert running.engine.waiting == 0 and running.engine.counts.steps <= 1 + 4
    assert running.draw(**APPLE).status_code == 200


def test_what_fails_fails_alone_and_tells_no_internals(fresh):
    running = fresh()
    marked = running.pipe.noise([666], 32, 32)[0]

    def refuse(network, args):
        if any(torch.equal(row, marked) for row in args[0]):
            raise RuntimeError("secret internals")

    running.pipe.transformer.register_forward_pre_hook(refuse)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda seed: running.draw(**APPLE, seed=seed), (1, 666, 2)))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    error = answers[1].json()["error"]
    assert error["type"] == "server_error" and "secret" not in answers[1].text
    assert running.client.get("/health").status_code == 200


def test_stopping_draws_what_was_begun_and_answers_503_to_newcomers(fresh):
    running = fresh()
    with running.held():
        begun = ThreadPoolExecutor(1).submit(running.draw, **APPLE, steps=50)
        until(lambda: running.engine.waiting == 2)
        running.engine.refuse()
        late = running.draw(**APPLE)
        assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
        assert running.client.get("/health").status_code == 503
        running.server.should_exit = True
    assert begun.result(60).status_code == 200
    running.thread.join(60)
    assert not running.thread.is_alive()


# ------------------------------------------------------------------ the command


def test_the_command_serves_and_ends_when_told(tiny_model):
    """A real process: SIGTERM while it draws, and the picture still arrives."""
    command = [sys.executable, "-m", "diffusionfm.cli", "serve", "--port", "0", "--model", str(tiny_model)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DIFFUSIONFM_API_KEY": KEY, "UVICORN_HOST": "0.0.0.0", "HOST": "0.0.0.0"},
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[2].removesuffix("/v1")
    assert url.startswith("http://127.0.0.1:")
    client = httpx.Client(
        base_url=url, timeout=60, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}
    )
    with client, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(client.post, DRAW, json=APPLE | {"steps": 300})
        until(lambda: "diffusionfm_waiting_pictures 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert begun.result(60).status_code == 200
    process.wait(60)
    assert "Traceback" not in process.stderr.read()
