"""An adapter says which model it was trained on; beside another it is refused, or taken with a word about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionfm.checks import base_hash
from diffusionfm.cli import main
from diffusionfm.finetune import FinetuneConfig
from diffusionfm.finetune.export import export
from diffusionfm.finetune.methods import build
from diffusionfm.lora import CONFIG, base_of
from diffusionfm.pipeline import DiffusionFMPipeline


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """A LoRA as fine-tuning leaves it, and the same in kohya's names."""
    folder = tmp_path_factory.mktemp("lora") / "style"
    objective = build(
        DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32"), FinetuneConfig(rank=2)
    )
    torch.manual_seed(1)
    for weight in objective.weights.values():
        weight.data += 0.1 * torch.randn_like(weight)
    objective.export(folder)
    file = folder.parent / "style.safetensors"
    export(folder, file, "kohya", model=tiny_model)
    return folder, file


@pytest.fixture(scope="module")
def other(tiny_model, tmp_path_factory) -> Path:
    """A model of the same shapes with other weights."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("other") / "other")
    pipe = DiffusionFMPipeline.from_pretrained(folder)
    pipe.transformer.patch_out.bias.data += 0.1
    pipe.save_pretrained(folder)
    return folder


def test_both_forms_name_the_model_they_were_trained_on(made, tiny_model):
    for source in made:
        assert base_of(source) == ("tiny", base_hash(tiny_model))


def test_the_hash_is_that_of_the_values_in_any_precision(tiny_model, other, tmp_path):
    halves = shutil.copytree(tiny_model, tmp_path / "half")
    wide = shutil.copytree(tiny_model, tmp_path / "wide")
    for file in halves.rglob("*.safetensors"):
        values = {key: value.to(torch.bfloat16) for key, value in load_file(file).items()}
        save_file(values, file)
        save_file(
            {k: v.float() for k, v in values.items()}, wide / file.relative_to(halves), {"format": "pt"}
        )
    assert base_hash(halves) == base_hash(wide) != base_hash(tiny_model) != base_hash(other)


def test_the_right_model_is_silent_and_another_refuses(made, tiny_model, other):
    for source in made:
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
        assert pipe.load_lora(source) == "" and pipe.fingerprint() == pipe.model_hash
        assert DiffusionFMPipeline.from_pretrained(tiny_model, dtype="bfloat16").load_lora(source) == ""
        pipe = DiffusionFMPipeline.from_pretrained(other)
        with pytest.raises(
            ValueError, match=rf"another model, 'tiny' \({base_hash(tiny_model)}\).*'other'"
        ) as caught:
            pipe.load_lora(source)
        assert base_hash(other) in str(caught.value) and "--lora-any" in str(caught.value)
        assert pipe.loras == {}
        assert "pictures may suffer" in pipe.load_lora(source, any_model=True)
        assert list(pipe.loras) == ["style"]


def test_one_that_tells_nothing_is_taken_with_a_word(made, other, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "style")
    settings = json.loads((folder / CONFIG).read_text())
    for revision in (None, "main", "0123456789abcdef0123456789abcdef01234567"):
        (folder / CONFIG).write_text(json.dumps(settings | {"revision": revision}))
        word = DiffusionFMPipeline.from_pretrained(other).load_lora(folder)
        assert "does not tell which model" in word
    file = tmp_path / "plain.safetensors"
    save_file(load_file(made[1]), file)
    assert "does not tell" in DiffusionFMPipeline.from_pretrained(other).load_lora(file)


def test_an_adapter_may_be_called_as_a_layer_is(made, tiny_model, tmp_path):
    for name in ("out", "blocks", "weight", "lora_A", "0"):
        folder = shutil.copytree(made[0], tmp_path / name)
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
        pipe.load_lora(folder)
        assert list(pipe.loras) == [name]


def test_on_the_command_line(made, other, tmp_path, capsys):
    command = [
        "generate",
        "a red apple",
        "--model",
        str(other),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert main([*command, "--lora", str(made[0])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "was trained on another model" in error and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
    assert main([*command, "--lora", str(made[0]), "--lora-any"]) == 0
    assert "note: " in capsys.readouterr().err and (tmp_path / "a.png").is_file()
    with pytest.raises(ValueError, match="another model"):
        export(made[0], tmp_path / "merged", model=other)
    assert not (tmp_path / "merged").exists()
