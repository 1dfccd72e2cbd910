"""Who may use the HTTP API, and what its logs say of them."""

from __future__ import annotations

import io
import json
import logging

import pytest
from serving import APPLE, DRAW, KEY, OTHER_KEY

from diffusionfm.cli import main
from diffusionfm.serve.access import Access, read_keys
from diffusionfm.serve.logs import JsonLines

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
