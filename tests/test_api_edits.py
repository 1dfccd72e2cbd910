"""Pictures sent to the HTTP API: edited, varied, or refused before any work."""

from __future__ import annotations

import base64
import io
import time

import httpx
import openai
import pytest
from PIL import Image
from serving import APPLE, near, picture

from diffusionfm.images import read_parameters
from diffusionfm.serve.forms import MAX_FORM


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


def test_a_text_that_reads_true_or_false_is_a_text_and_a_switch_is_none(api):
    answer = edit(api, prompt="true", negative_prompt="false", metadata="false", stream="false", steps="1")
    assert answer.status_code == 200, answer.text
    assert not picture(answer.json()["data"][0]).info
    told = picture(edit(api, prompt="true", user="false", metadata="true", steps="1").json()["data"][0]).info
    assert '"prompt": "true"' in str(told)


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
