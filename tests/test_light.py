"""Drawing without diffusers and transformers: the same bytes, and none of their modules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionfm.checks import CHECKSUMS
from diffusionfm.light import Bert, open_painter
from diffusionfm.lora import CONFIG, FEW_STEP, PEFT, WEIGHTS
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.vocabulary import FILE

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


@pytest.fixture(scope="module")
def quick(tiny_model, tmp_path_factory):
    """The tiny pipeline's folder with a few-step adapter and a list of words."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("quick") / "tiny")
    (folder / FILE).write_text("red\napple\n")
    (folder / FEW_STEP).mkdir()
    base = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (high, wide), layer = base["patch_out.weight"].shape, f"{PEFT}patch_out"
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{layer}.lora_A.weight": torch.randn(2, wide, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(high, 2, generator=generator),
    }
    save_file(weights, folder / FEW_STEP / WEIGHTS)
    (folder / FEW_STEP / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (folder / FEW_STEP / "generation.json").write_text(json.dumps({"steps": 2, "guidance": 1.0}))
    return folder


@pytest.mark.parametrize("more", [[], ["--fast"], ["--image", "from.png", "--mask", "mask.png"]])
def test_generate_imports_no_zoo(quick, tmp_path, more):
    Image.new("RGBA", (32, 32), "red").save(tmp_path / "from.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    arguments = ["generate", "a red apple", "-o", "apple.png", "--quiet", "--model", str(quick), *more]
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


def test_the_few_step_adapter_and_the_words_are_the_pipelines(quick):
    plain, painter = open_painter(quick), open_painter(quick, fast=True)
    pipe = DiffusionFMPipeline.from_pretrained(quick, fast=True)
    assert painter.fast and painter.model_name == pipe.model_name == "tiny-fast"
    assert painter.defaults == pipe.defaults and painter.defaults["steps"] == 2
    assert plain.fingerprint() != painter.fingerprint() == pipe.fingerprint()
    ours, theirs = painter("a red zebra", seed=3), pipe("a red zebra", seed=3)
    assert ours.images[0].tobytes() == theirs.images[0].tobytes()
    assert ours.warnings == theirs.warnings == ["the model never learned the word 'zebra'"]


def test_damaged_weights_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("decoder."))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file)
    with pytest.raises(ValueError, match="is not the file that was saved"):
        open_painter(folder)
    (folder / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        open_painter(folder)


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
