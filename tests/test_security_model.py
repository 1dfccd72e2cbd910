"""The security checklist, a test a line: models (M) and privacy (V); V1 and V3 against a running API or studio."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import APPLE, picture

from diffusionfm.checks import CHECKSUMS, COMPONENTS
from diffusionfm.formats import FORMATS, Finish
from diffusionfm.images import read_parameters
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------ models


def refused(folder: Path) -> str:
    """Why a model folder is not loaded: one line."""
    with pytest.raises(ValueError) as caught:
        DiffusionFMPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


class Canary:
    """Pickled, and let loose where something unpickles it."""

    def __reduce__(self):
        return (Path.touch, (Path("canary-was-run"),))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl"])
def test_m1_pickled_weights_are_refused_unread(model, suffix, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    (model / TRANSFORMER).rename((model / TRANSFORMER).with_suffix(suffix))
    assert "pickled" in refused(model)


def test_m2_a_pickle_by_another_name_is_refused(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (model / TRANSFORMER).write_bytes(pickle.dumps(Canary()) + bytes(100))
    assert "safetensors" in refused(model)
    (model / TRANSFORMER).rename((model / TRANSFORMER).with_suffix(".SafeTensors"))
    assert "is missing" in refused(model)
    assert not (tmp_path / "canary-was-run").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("model_index.json", {"_class_name": "os.system"}),
        *(("model_index.json", {name: ["subprocess", "Popen"]}) for name in COMPONENTS),
        ("model_index.json", {"extra": ["os", "system"]}),
        ("text_encoder/config.json", {"model_type": "evil"}),
    ],
)
def test_m3_a_folder_chooses_no_code(model, file, change):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refused(model) and "evil" not in sys.modules


@pytest.mark.parametrize(
    "key", ["trust_remote_code", "_attn_implementation", "_attn_implementation_internal"]
)
def test_m3_switches_that_fetch_code_are_refused(model, key):
    path = model / "text_encoder/config.json"
    plain = path.read_text()
    for config in ({key: "evil/repo"}, {"text_config": {key: "evil/repo"}}):
        path.write_text(json.dumps(json.loads(plain) | config))
        assert "remote code" in refused(model) and key in refused(model)


def long_header(data: bytes) -> bytes:
    return (2**63 - 1).to_bytes(8, "little") + data[8:]


def beyond(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    next(entry for key, entry in header.items() if key != "__metadata__")["data_offsets"][1] += 10**6
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    "damage", [long_header, beyond, lambda data: data[:-9], lambda data: data[:20], lambda _: b""]
)
def test_m4_a_damaged_file_is_named(model, damage):
    path = model / TRANSFORMER
    path.write_bytes(damage(path.read_bytes()))
    assert "transformer" in refused(model)


def spoil(weights: dict, how: str) -> None:
    key = "patch_out.weight"
    if how == "no numbers":
        weights[key][0] = float("nan")
    elif how == "another shape":
        weights[key] = weights[key][:-1].clone()
    elif how == "missing":
        del weights[key]
    else:
        weights["surplus"] = torch.zeros(1)


@pytest.mark.parametrize("how", ["no numbers", "another shape", "missing", "surplus"])
def test_m4_weights_that_do_not_fit_are_named(model, how):
    weights = load_file(model / TRANSFORMER)
    spoil(weights, how)
    save_file(weights, model / TRANSFORMER, metadata={"format": "pt"})
    (model / CHECKSUMS).unlink()
    assert "transformer" in refused(model)


def test_m5_nothing_unpickles():
    from test_layers import test_nothing_unpickles_evaluates_or_opens_a_shell as walls

    walls()


def test_m6_a_flipped_bit_is_seen(model):
    data = bytearray((model / TRANSFORMER).read_bytes())
    data[-5] ^= 1
    (model / TRANSFORMER).write_bytes(bytes(data))
    assert "is not the file that was saved" in refused(model)
    (model / CHECKSUMS).unlink()  # the explicit way around
    DiffusionFMPipeline.from_pretrained(model)


def test_m6_the_shipped_model_has_its_sums():
    from diffusionfm.checks import SHIPPED, check_checksums

    assert (SHIPPED / CHECKSUMS).is_file()
    check_checksums(SHIPPED)


# ------------------------------------------------------------------ privacy

OFFLINE = """
import sys
def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"asked for the address of {arguments[0]}")
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        raise SystemExit(f"connected to {arguments[1]}")
sys.addaudithook(watch)
import os
os.environ["NO_PROXY"] = "*"
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.models import Models
from diffusionfm.pipeline import DiffusionFMPipeline
from demo import app
pipe = DiffusionFMPipeline.from_pretrained(sys.argv[1])
assert pipe("a red apple", num_inference_steps=1).images
with Models(Engine(pipe)) as models:
    studio = app.build(models)
    app.launch(studio, models, int(sys.argv[2]))
    studio.close()
print("quiet", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_v1_drawing_and_the_studio_need_no_network(tiny_model):
    pytest.importorskip("gradio")
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        port = str(here.getsockname()[1])
    command = [sys.executable, "-c", OFFLINE, str(tiny_model), port]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.stdout.endswith("quiet\n"), ended.stderr[-2000:]


SECRET = {
    "prompt": "walrus",
    "seed": 7,
    "steps": 3,
    "guidance": 2.0,
    "width": 32,
    "height": 32,
    "model": "tiny",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_v2_every_file_says_where_it_is_from_or_nothing_at_all(kind):
    image = Image.new("RGBA", (32, 32), (200, 30, 30, 255))
    image.info |= {"comment": "walrus", "exif": b"walrus"}
    with_all, bare = Finish(kind).encode(image, SECRET), Finish(kind).encode(image, None)
    assert b"trainedAlgorithmicMedia" in with_all and b"walrus" in with_all
    assert read_parameters(io.BytesIO(with_all)) == SECRET if kind != "svg" else b'"seed": 7' in with_all
    for word in (b"walrus", b"trained", b"DiffusionFM", b"diffusionfm", b"xmp", b"rdf"):
        assert word not in bare, word
    assert parts(kind, bare) <= {"IHDR", "IDAT", "IEND", "VP8X", "VP8L", "svg", "path"}


def parts(kind: str, data: bytes) -> set[str]:
    """What a file is made of: PNG's chunks, WebP's, or the elements of an SVG."""
    found = set()
    if kind == "svg":
        return {element.tag.partition("}")[2] for element in ET.fromstring(data).iter()}
    png = kind == "png"
    at = 8 if png else 12
    while at < len(data):
        name, size = (at + 4, at) if png else (at, at + 4)
        length = int.from_bytes(data[size : size + 4], "big" if png else "little")
        found.add(data[name : name + 4].decode())
        at += 12 + length if png else 8 + length + length % 2
    return found


def test_v2_pixels_hide_nothing(api):
    bare = api.draw(**APPLE, seed=1, metadata=False).json()["data"][0]
    told = api.draw(**APPLE, seed=1).json()["data"][0]
    assert picture(bare).tobytes() == picture(told).tobytes() and not picture(bare).info
    assert b"apple" not in base64.b64decode(bare["b64_json"])


def test_v3_prompts_stay_out_of_the_log(api, caplog):
    with caplog.at_level(logging.DEBUG):
        assert api.draw(prompt="a walrus", negative_prompt="giraffe", steps=1).status_code == 200
        assert api.draw(prompt="a walrus", steps=0).status_code == 400
    told = " ".join(f"{record.getMessage()} {record.__dict__.get('facts', '')}" for record in caplog.records)
    assert "request" in told and "walrus" not in told and "giraffe" not in told


def test_flagged_pictures_say_so(api, tiny_pipe):
    answer = api.draw(prompt="a nude", seed=3, steps=1).json()["data"][0]
    assert answer["flagged"] is True
    assert picture(answer).tobytes() == tiny_pipe("a nude", seed=3, num_inference_steps=1).images[0].tobytes()
    assert api.draw(**APPLE, steps=1).json()["data"][0]["flagged"] is False


def test_looks_at_a_flagged_picture_are_blurred(tiny_pipe):
    looks = []
    with Engine(tiny_pipe) as engine:
        for prompt in ("a nude", "a rude"):
            engine.submit(
                Request(prompt, seed=3, steps=3), "", lambda *given: looks.append(given[2]())
            ).result(60)
    rough = [sum(abs(a - b) for a, b in zip(i.tobytes(), i.tobytes()[4:], strict=False)) for (i,) in looks]
    assert len(rough) == 6 and max(rough[:3]) < min(rough[3:]) / 2
