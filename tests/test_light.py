"""Drawing without diffusers and transformers: the same bytes, and none of their modules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from diffusionfm.light import Bert, open_painter

HEAVY = [
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "torch._dynamo",
    "sympy",
    "scipy",
]


def test_generate_imports_no_zoo(tiny_model, tmp_path):
    arguments = ["generate", "a red apple", "-o", "apple.png", "--quiet", "--model", str(tiny_model)]
    code = f"""
import sys
from diffusionfm.cli import main
assert main({arguments!r}) == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "apple.png").is_file()


def test_a_painter_draws_the_pipelines_bytes(tiny_model, tiny_pipe):
    painter = open_painter(tiny_model)
    assert type(painter).__name__ == "Painter"
    long = "a red apple " * 30 + "zebra"
    asked = {"prompt": ["a red apple", long, "café"], "negative_prompt": "naïve", "num_images": 2, "seed": 5}
    ours, theirs = painter(**asked), tiny_pipe(**asked)
    assert [p.tobytes() for p in ours.images] == [p.tobytes() for p in theirs.images]
    assert ours.warnings == theirs.warnings != []
    assert painter.fingerprint() == tiny_pipe.fingerprint()
    settings = {"guidance": 3, "steps": 3, "negative_prompt": ""}
    assert painter.describe("a", 1, settings) == {**tiny_pipe.describe("a", 1, settings), "model": "tiny"}


def test_padded_prompts_are_encoded_as_by_transformers(tiny_model, tiny_pipe):
    import torch

    from diffusionfm.text import encode_prompts

    painter, prompts = open_painter(tiny_model), ["a red apple", "yellow"]
    ours = encode_prompts(painter.tokenizer, painter.text_encoder, prompts)
    theirs = encode_prompts(tiny_pipe.tokenizer, tiny_pipe.text_encoder, prompts)
    assert isinstance(painter.text_encoder, Bert)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_another_kind_of_model_is_left_to_its_library(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    assert type(open_painter(folder)).__name__ == "DiffusionFMPipeline"


@pytest.mark.parametrize("change", [{"width": 64}, {"depth": 3}, {"wdith": 32}, {"heads": 5}])
def test_weights_that_do_not_fit_are_refused_in_one_line(tiny_model, tmp_path, change):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="do not fit") as caught:
        open_painter(folder)
    assert "\n" not in str(caught.value)
