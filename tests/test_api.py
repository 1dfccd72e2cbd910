"""The HTTP API on loopback with a real tiny model: what it answers, what it refuses, and whom."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import APPLE, DRAW, Running, picture, until

from diffusionfm.cli import main
from diffusionfm.images import read_parameters
from diffusionfm.serve.access import Access, Rate, read_keys
from diffusionfm.serve.api import MAX_BODY
from diffusionfm.serve.forms import MAX_FORM
from diffusionfm.serve.jobs import Limits
from diffusionfm.serve.logs import JsonLines

KEY, OTHER_KEY = "k" * 16, "o" * 16


@pytest.fixture(scope="module")
def api(tiny_model):
    running = Running(tiny_model)
    yield running
    running.stop()


@pytest.fixture
def fresh(tiny_model):
    """A function that starts a server with limits or keys of its own."""
    begun = []

    def start(**options) -> Running:
        begun.append(Running(tiny_model, **options))
        return begun[-1]

    yield start
    for running in begun:
        running.stop()


def near(a, b) -> bool:
    return abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


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


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("bad", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": 7}, "prompt", "must be text"),
        ({"prompt": "x" * 10_001}, "prompt", "shorten"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"negative_prompt": ["a"]}, "negative_prompt", "must be text"),
        *(({"n": n}, "n", "from 1 to 10") for n in (0, 11, 10**6, 1.5, "2", True)),
        *(({"size": size}, "size", "size is") for size in ("a", "0x0x0", "-8x32", "1e9x32", 128, ["32x32"])),
        *(({"size": size}, "size", "must be") for size in ("0x32", "7x32", "99999x32", "40x32")),
        *(({"steps": steps}, "steps", "steps must be") for steps in (0, 10**9, 2.5, "9")),
        *(({"guidance": g}, "guidance", "guidance must be") for g in (-1, 51, "a", True)),
        *(({"seed": seed}, "seed", "seed must be") for seed in (-1, 2**64, 1.5, "a")),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "seed must be"),
        ({"response_format": "url"}, "response_format", "no URL"),
        ({"output_format": "webp"}, "output_format", "png"),
        ({"background": "pink"}, "background", "transparent, opaque, auto"),
        ({"metadata": "no"}, "metadata", "true or false"),
        ({"user": "x" * 300}, "user", "256"),
        ({"stream": True}, "stream", "leave it out"),
        ({"quality": "hd"}, "quality", "leave it out"),
        ({"cfg": 3}, "cfg", "unknown parameter"),
        *(({"lora": lora}, "lora", "lora is") for lora in (3, [1], {"a": 1})),
        *(({"lora": lora}, "lora", "no LoRA") for lora in ("../../etc/passwd", "x:1", "/etc/passwd:nan")),
        ({"size": "1024x1024", "steps": 500, "n": 3}, None, "fewer pictures or steps"),
    ],
)
def test_bad_values_are_refused_before_any_work(api, bad, param, words):
    calls = api.engine.counts.calls
    answer = api.draw(**APPLE | bad)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert api.engine.counts.calls == calls


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"prompt": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 9999 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(api, body):
    answer = api.client.post(DRAW, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_drips_is_not_waited_for(api, monkeypatch):
    monkeypatch.setattr("diffusionfm.serve.api.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", api.port)) as caller:
        head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        caller.sendall(head.encode() + b"Content-Length: 9\r\n\r\n{")
        assert caller.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_lone_surrogate_is_refused(api):
    answer = api.client.post(
        DRAW, content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400 and "surrogate" in answer.json()["error"]["message"]


def test_parameters_without_meaning_may_be_left_at_auto(api):
    assert api.draw(**APPLE, quality="auto", stream=False, style=None, model=None).status_code == 200


def test_large_bodies_are_refused_announced_or_not(api):
    big = b'{"prompt": "' + b"x" * MAX_BODY + b'"}'
    kind = {"Content-Type": "application/json"}
    assert api.client.post(DRAW, content=big, headers=kind).status_code == 413
    assert api.client.post(DRAW, content=iter([big]), headers=kind).status_code == 413
    assert api.client.post(DRAW, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert api.draw(**APPLE).status_code == 200


opened: list[str] = []
watching = threading.Event()


def _note(event: str, arguments: tuple) -> None:
    if watching.is_set() and event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(arguments[0]))


def test_no_value_of_a_request_opens_a_file(api, tmp_path):
    secret = tmp_path / "canary.txt"
    secret.write_text("secret")
    sys.addaudithook(_note)  # it cannot be removed, but it sleeps outside this test
    watching.set()
    try:
        for key in ("model", "lora", "size", "background", "user", "prompt", "negative_prompt"):
            for path in (str(secret), f"file://{secret}", f"../../../../{secret}", f"{secret}:1"):
                assert api.draw(**APPLE | {key: path}).status_code in (200, 400, 404)
        for path in (
            f"/v1/models/{secret}",
            "/v1/models/..%2f..%2fetc%2fpasswd",
            f"/{secret}",
            "/file=/etc/passwd",
        ):
            assert api.client.get(path).status_code == 404
    finally:
        watching.clear()
    assert not [path for path in opened if "canary" in path or "passwd" in path]


# ------------------------------------------------------------------ LoRAs


def test_a_lora_is_asked_for_by_its_name(api, tiny_model, tmp_path, fresh):
    from test_engine import write_lora

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


# ------------------------------------------------------------------ who may


def test_with_keys_every_door_but_health_is_shut(fresh):
    running = fresh(keys=[KEY, OTHER_KEY])
    for route in running.service.routes():
        path = route.path.replace("{name}", "tiny")
        answer = running.client.request("POST" if "POST" in route.methods else "GET", path)
        assert answer.status_code == (200 if path == "/health" else 401), path
    good = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert running.client.post(DRAW, json=APPLE, headers=good).status_code == 200
    for wrong in ("Bearer", "Bearer nope", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"):
        answer = running.client.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    for _ in range(5):
        wrong = running.client.get("/v1/models", headers={"Authorization": "Bearer no"})
        assert wrong.status_code == 401
    answer = running.client.get("/v1/models", headers=good)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_pages_of_others_cannot_use_it(api):
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "[::1"},
        {"Host": "127.0.0.1@evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
    ):
        answer = api.client.post(DRAW, json=APPLE, headers=headers)
        assert answer.status_code == 403, headers
        assert "access-control-allow-origin" not in answer.headers
    assert api.client.post(DRAW, json=APPLE, headers={"Origin": api.url}).status_code == 200
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = api.client.options(DRAW, headers=asked)
    assert preflight.status_code == 405 and not [
        k for k in preflight.headers if k.startswith("access-control")
    ]


def test_turns_go_by_key_or_by_user():
    one, two = Access([KEY], "0.0.0.0"), Access([KEY, OTHER_KEY], "0.0.0.0")
    assert one.turn("10.0.0.1", "ann") != one.turn("10.0.0.1", "bob")
    assert two.turn("key 1", "ann") == two.turn("key 1", "bob")


def test_unknown_paths_answer_in_the_same_shape(api):
    answer = api.client.get("/v1/images")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
    assert api.client.get(DRAW).status_code == 405


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--host", "::"], "needs a key"),
        (["--port", "99999"], "a port is"),
        (["--model", "nowhere"], "no model folder"),
        (["--lora", "nowhere"], "no LoRA folder"),
        (["--api-key-file", "nowhere"], "no file at"),
        (["--requests-per-minute", "0"], "requests a minute"),
    ],
)
def test_the_command_refuses_in_one_line(options, words, capsys, monkeypatch):
    monkeypatch.delenv("DIFFUSIONFM_API_KEY", raising=False)
    assert main(["serve", *options]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_keys_are_read_and_weak_ones_refused(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text(f"# two\n{KEY}\n\n{OTHER_KEY}\n")
    file.chmod(0o600)
    assert read_keys(file, "ignored") == [KEY, OTHER_KEY]
    assert read_keys(None, KEY) == [KEY] and read_keys(None, None) == []
    for bad in ("", "short", "with spaces in the key", "é" * 20):
        file.write_text(bad)
        with pytest.raises(ValueError, match="key"):
            read_keys(file, None)


# ------------------------------------------------------------------ logs


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs_are_json_lines_and_hold_prompts_only_on_demand(fresh, log_prompts):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("diffusionfm.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        running = fresh(log_prompts=log_prompts)
        answer = running.draw(prompt="zebra", negative_prompt="giraffe", user="walrus")
        running.draw(prompt="zebra", steps=0)
    finally:
        logger.removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["id"] == answer.headers["x-request-id"] and lines[0]["pictures"] == 1
    assert lines[1]["why"] == "steps"
    told = [word in stream.getvalue() for word in ("zebra", "giraffe", "walrus")]
    assert told == [log_prompts, log_prompts, False]


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


# ------------------------------------------------------------------ pictures sent to it


def upload(size=(32, 32), hole=None, kind="PNG", **options) -> bytes:
    """The bytes of a picture of noise, transparent in the box `hole`."""
    image = Image.effect_noise(size, 90).convert("RGBA" if kind == "PNG" else "RGB")
    if hole is not None:
        image.paste((0, 0, 0, 0), hole)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def edit(api, endpoint="edits", files=None, **fields) -> httpx.Response:
    files = {"image": ("a.png", upload(), "image/png")} if files is None else files
    return api.client.post(f"/v1/images/{endpoint}", data=fields, files=files)


def test_the_official_client_edits(api, tiny_pipe):
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)
    photo = upload()
    drawn = client.images.edit(
        image=("a.png", photo),
        mask=("m.png", upload(hole=(8, 8, 24, 24))),
        prompt="yellow star",
        n=2,
        size="32x32",
        background="transparent",
        extra_body={"seed": 5, "steps": 4, "strength": 0.9, "guidance": 2},
    )
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    whole = Image.open(io.BytesIO(photo))
    expected = tiny_pipe(
        "yellow star",
        num_images=2,
        seed=5,
        num_inference_steps=4,
        guidance_scale=2,
        image=whole,
        mask_image=mask,
        strength=0.9,
    )
    for entry, image in zip(drawn.data, expected.images, strict=True):
        data = base64.b64decode(entry.b64_json)
        with Image.open(io.BytesIO(data)) as found:
            assert near(found, image)
            assert found.crop((0, 0, 32, 8)).tobytes() == whole.crop((0, 0, 32, 8)).tobytes()
        assert read_parameters(io.BytesIO(data))["strength"] == 0.9
    with pytest.raises(openai.BadRequestError, match="strength must be") as caught:
        client.images.edit(image=("a.png", photo), prompt="yellow star", extra_body={"strength": 7})
    assert caught.value.param == "strength"


def test_variations_read_the_prompt_of_the_picture(api, tiny_pipe):
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)
    file = base64.b64decode(api.draw(**APPLE, seed=3).json()["data"][0]["b64_json"])
    drawn = client.images.create_variation(image=("apple.png", file), n=1, extra_body={"seed": 8})
    expected = tiny_pipe("a red apple", seed=8, image=Image.open(io.BytesIO(file))).images[0]
    assert near(picture({"b64_json": drawn.data[0].b64_json}), expected)
    bare = edit(api, "variations", {"image": ("p.jpg", upload((64, 48), kind="JPEG"))}, seed="8")
    assert bare.status_code == 200 and picture(bare.json()["data"][0]).size == (32, 32)


@pytest.mark.parametrize(
    ("endpoint", "files", "fields", "param"),
    [
        ("edits", {}, {"prompt": "x"}, None),
        ("edits", {"mask": upload(hole=(0, 0, 8, 8))}, {"prompt": "x"}, "image"),
        ("edits", None, {}, "prompt"),
        ("edits", None, {"prompt": "x", "n": "many"}, "n"),
        ("edits", None, {"prompt": "x", "strength": "nan"}, "strength"),
        ("edits", None, {"prompt": "x", "steps": "1e9"}, "steps"),
        ("edits", None, {"prompt": "x", "path": "/etc/passwd"}, "path"),
        ("edits", None, {"prompt": "x", "mask": "/etc/passwd"}, "mask"),
        ("edits", {"image": b"<svg/>"}, {"prompt": "x"}, "image"),
        ("edits", {"image": upload()[:-300]}, {"prompt": "x"}, "image"),
        ("edits", {"image": upload(), "mask": upload()}, {"prompt": "x"}, "mask"),
        ("edits", {"image": upload(), "mask": upload((9, 9), (0, 0, 5, 5))}, {"prompt": "x"}, "mask"),
        ("edits", {"image": upload(), "other": upload()}, {"prompt": "x"}, "other"),
        ("variations", {"image": upload(), "mask": upload(hole=(0, 0, 8, 8))}, {}, "mask"),
        ("variations", {}, {"n": "1"}, None),
    ],
)
def test_what_cannot_be_edited_is_refused(api, endpoint, files, fields, param):
    calls = api.engine.counts.calls
    answer = edit(api, endpoint, files, **fields)
    assert answer.status_code in (400, 415), answer.text
    assert answer.json()["error"]["param"] == param and api.engine.counts.calls == calls


def test_a_picture_bomb_and_a_flood_are_refused(api):
    bomb = io.BytesIO()
    Image.new("1", (25_000, 25_000)).save(bomb, "PNG")
    began = time.monotonic()
    answer = edit(api, files={"image": bomb.getvalue()}, prompt="x")
    assert answer.status_code == 400 and time.monotonic() - began < 5
    assert edit(api, files={"image": b"x" * (MAX_FORM + 1)}, prompt="x").status_code == 413
    assert api.client.post("/v1/images/edits", json=APPLE).status_code == 415
    head = {"Content-Type": "multipart/form-data"}
    assert api.client.post("/v1/images/edits", headers=head, content=b"x").status_code == 400
