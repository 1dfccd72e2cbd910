"""What a newcomer does: twenty pictures in a folder, adapted, used in a batch and in the studio, in three commands.

They are the README's, with a tiny model and few steps added."""

from __future__ import annotations

import base64
import io
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from diffusionfm.cli import main
from diffusionfm.lora import base_of
from tests.finetune_toys import draw_pictures

ROOT = Path(__file__).resolve().parents[1]


def post(url: str, **body: object) -> dict:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=120))


def commands() -> list[list[str]]:
    """The words after `diffusionfm` of the README's three commands for one's own pictures."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Fine-tuning")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.mark.slow
def test_three_commands(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "my-pictures", 20)
    model = ["--model", str(tiny_model)]
    train, batch, demo = commands()
    few = ["--steps", "60", "--lr", "0.01", "--quiet"]
    assert main([*train, *model, *few]) == 0
    told = capfd.readouterr()
    assert "use it with" in told.out and "step/s" not in told.err and "%|" not in told.err
    page = Path("my-style/report.html").read_text()
    assert "It learned: the loss on pictures it had not seen fell" in page
    assert base_of(Path("my-style"))[0] == tiny_model.name

    Path("rows.txt").write_text("a red circle, my style\na blue circle, my style\n")
    batch += [*model, "--device", "cpu", "--quiet"]
    assert main(batch) == 0
    plain = [word for word in batch if word not in ("--lora", "my-style")]
    assert main([word.replace("drawn", "plain") for word in plain]) == 0
    for line in Path("drawn/manifest.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["made_by"]["lora"] == ["my-style:1"]
        plain, drawn = (Path(folder, record["file"]).read_bytes() for folder in ("plain", "drawn"))
        assert Image.open(io.BytesIO(plain)).tobytes() != Image.open(io.BytesIO(drawn)).tobytes()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo += [*model, "--device", "cpu", "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "diffusionfm.cli", *demo]) as studio:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert studio.poll() is None
                try:
                    models = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=5))
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            assert models["data"][0]["loras"] == ["my-style"]
            body = {"prompt": "a red circle, my style", "seed": 1}
            drawn = [
                base64.b64decode(post(f"{url}/v1/images/generations", **body, **more)["data"][0]["b64_json"])
                for more in ({}, {"lora": "my-style"})
            ]
            assert Image.open(io.BytesIO(drawn[0])).tobytes() != Image.open(io.BytesIO(drawn[1])).tobytes()
        finally:
            studio.terminate()
