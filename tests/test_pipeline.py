"""The pipeline: load, save, draw, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionfm import Cancelled, DiffusionFMPipeline
from diffusionfm.checks import SHIPPED, read_defaults


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_save_load_same_picture(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "again")
    again = DiffusionFMPipeline.from_pretrained(tmp_path / "again")
    assert again.defaults == tiny_pipe.defaults
    assert again.fingerprint() == tiny_pipe.fingerprint()
    first, second = (p("a red apple", seed=7).images[0] for p in (tiny_pipe, again))
    assert first.mode == "RGBA" and first.size == (32, 32)
    assert first.tobytes() == second.tobytes()
    suffixes = {file.suffix for file in (tmp_path / "again").rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors"}


def test_prompt_seed_and_guidance_matter(tiny_pipe):
    base = tiny_pipe("a red apple", seed=1).images[0].tobytes()
    assert base == tiny_pipe(["a red apple"], seed=[1]).images[0].tobytes()
    for other in (
        tiny_pipe("a blue fish", seed=1),
        tiny_pipe("a red apple", seed=2),
        tiny_pipe("a red apple", seed=1, guidance_scale=1.0),
        tiny_pipe("a red apple", seed=1, guidance_scale=0),
        tiny_pipe("a red apple", "a blue fish", seed=1),
    ):
        assert other.images[0].tobytes() != base


def test_picture_does_not_depend_on_its_batch(tiny_pipe):
    pipe = tiny_pipe
    prompts = ["a red apple", "yellow star, naïve, sketch of a house", "fish"]
    whole = pipe(prompts, num_images=3, seed=[5, 100, 2**40], batch_size=9)
    assert whole.seeds == [5, 6, 7, 100, 101, 102, 2**40, 2**40 + 1, 2**40 + 2]
    apart = pipe(prompts, num_images=3, seed=[5, 100, 2**40], batch_size=2)
    for k, (a, b) in enumerate(zip(whole.images, apart.images, strict=True)):
        alone = pipe(prompts[k // 3], seed=whole.seeds[k]).images[0]
        assert abs(pixels(a) - pixels(b)).max() <= 1
        assert abs(pixels(a) - pixels(alone)).max() <= 1
    assert torch.equal(pipe.noise([3, 4, 5], 32, 48)[2], pipe.noise([5], 32, 48)[0])


def test_sizes_steps_and_preview(tiny_pipe):
    calls = []

    def on_step(step, total, preview):
        calls.append((step, total, preview()[0].size))

    result = tiny_pipe(
        "yellow star", num_images=3, batch_size=2, width=48, height=64, num_inference_steps=2, on_step=on_step
    )
    assert [image.size for image in result.images] == [(48, 64)] * 3
    assert calls == [(k, 4, (48, 64)) for k in (1, 2, 3, 4)]


def test_last_preview_is_the_picture(tiny_pipe):
    seen = []
    result = tiny_pipe("yellow star", on_step=lambda step, total, preview: seen.append(preview()[0]) and None)
    assert abs(pixels(seen[-1]) - pixels(result.images[0])).max() <= 1


def test_cancel_stops_at_once(tiny_pipe):
    steps = []
    with pytest.raises(Cancelled, match="step 2 of 50"):
        tiny_pipe(
            "a red apple", num_inference_steps=50, on_step=lambda step, *_: steps.append(step) or step == 2
        )
    assert steps == [1, 2]


def test_long_prompt_is_reported(tiny_pipe):
    assert tiny_pipe("a red apple").warnings == []
    (warning,) = tiny_pipe("a red apple " * 30 + "zebra", num_inference_steps=1).warnings
    assert "24 tokens" in warning and "zebra" in warning


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "x" * 20_000}, "shorten"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"num_inference_steps": 0}, "steps must be from 1 to 500"),
        ({"num_inference_steps": 10**6}, "steps must be"),
        ({"height": 100}, "multiple of 16, got 100: try 96"),
        ({"width": 4096}, "width must be from 32 to 2048"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"guidance_scale": 51}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed"),
        ({"seed": [1, 2]}, "1 prompts but 2 seeds"),
        ({"num_images": 0}, "number of images"),
        ({"batch_size": 0}, "number of images"),
    ],
)
def test_absurd_requests_are_refused(tiny_pipe, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny_pipe(**{"prompt": "a red apple", **arguments})
    assert "\n" not in str(caught.value)


def _edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(folder: Path) -> None:
    (folder / "transformer/diffusion_pytorch_model.safetensors").rename(
        folder / "transformer/pytorch_model.bin"
    )


def _cut(folder: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _surplus(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["patch_out.wait"] = weights.pop("patch_out.weight")
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "no model folder"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "not readable JSON"),
        (lambda f: _edit(f, "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (lambda f: _edit(f, "model_index.json", vae=["os", "system"]), "vae is .* not allowed"),
        (lambda f: _edit(f, "model_index.json", safety=["os", "system"]), "'safety' is unknown"),
        (lambda f: _edit(f, "transformer/config.json", auto_map={"A": "b.C"}), "remote code"),
        (lambda f: _edit(f, "transformer/config.json", width=64), "do not fit"),
        (lambda f: _edit(f, "transformer/config.json", depth=3), "missing keys"),
        (lambda f: _edit(f, "generation.json", setps=3), "unknown key 'setps'"),
        (lambda f: _edit(f, "generation.json", steps=0), "steps must be"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors is missing"),
        (_pickled, "pytorch_model.bin is pickled"),
        (_cut, "header says"),
        (_surplus, "(missing|unexpected) keys"),
    ],
)
def test_a_bad_model_folder_is_refused(tiny_model, tmp_path, damage, words):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=words) as caught:
        DiffusionFMPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_lora_changes_the_picture_by_its_scale(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    plain = pipe("a red apple", seed=1).images[0].tobytes()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["qkv", "text_kv"], init_lora_weights=False)
    torch.manual_seed(0)
    network = inject_adapter_in_model(config, pipe.transformer, adapter_name="made")
    expected = pipe("a red apple", seed=1).images[0].tobytes()
    folder = tmp_path / "lora"
    config.save_pretrained(folder)
    weights = {
        f"base_model.model.{k}": v.contiguous()
        for k, v in get_peft_model_state_dict(network, adapter_name="made").items()
    }
    save_file(weights, folder / "adapter_model.safetensors")

    drawn = {}
    for scale in (0.0, 0.5, 1.0):
        fresh = DiffusionFMPipeline.from_pretrained(tiny_model)
        fresh.load_lora(folder, scale)
        drawn[scale] = fresh("a red apple", seed=1).images[0].tobytes()
    assert drawn[0.0] == plain and drawn[1.0] == expected
    assert len({*drawn.values()}) == 3

    twice = DiffusionFMPipeline.from_pretrained(tiny_model)
    twice.load_lora(folder, 0.5)
    twice.load_lora(folder, 0.5)
    difference = np.abs(
        np.frombuffer(twice("a red apple", seed=1).images[0].tobytes(), np.uint8).astype(int)
        - np.frombuffer(expected, np.uint8)
    )
    assert difference.max() <= 1

    weights[next(iter(weights))] = torch.zeros(2, 7)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="another model"):
        DiffusionFMPipeline.from_pretrained(tiny_model).load_lora(folder)


def test_bfloat16_draws_nearly_the_same(tiny_model, tiny_pipe):
    half = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="bfloat16")
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    a, b = (pixels(pipe("a red apple", guidance_scale=1.0).images[0]) for pipe in (half, tiny_pipe))
    assert abs(a - b).mean() < 10


def test_the_shipped_scheduler_steps_where_the_sampler_does():
    told = json.loads((SHIPPED / "scheduler" / "scheduler_config.json").read_text())
    assert (
        told["shift"] == read_defaults(SHIPPED)["shift"]
    )  # others draw the same weights by diffusers' scheduler
