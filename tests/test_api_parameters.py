"""What a request to the HTTP API may hold: every bad value is named and refused, and none opens a file."""

from __future__ import annotations

import socket
import sys
import threading

import pytest
from serving import APPLE, DRAW

from diffusionfm.serve.api import MAX_BODY


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
