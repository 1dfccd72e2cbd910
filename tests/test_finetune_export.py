"""Take it anywhere: merged models, kohya's and ComfyUI's names; loaded back, each draws the same picture."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionfm.cli import main
from diffusionfm.finetune import RECORD, FinetuneConfig, finetune
from diffusionfm.finetune.export import export
from diffusionfm.finetune.methods import AdapterFlowMatching, FullFlowMatching, build, swapped
from diffusionfm.lora import CONFIG, WEIGHTS, as_kohya, check_lora, parse_lora, read_folder
from diffusionfm.pipeline import DiffusionFMPipeline
from tests.finetune_toys import SHORT, contents, draw_pictures

PROMPT = "a red apple"


def draw(pipe: DiffusionFMPipeline) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=3).images[0].convert("RGBa")).astype(int)


def load(model, *loras) -> DiffusionFMPipeline:
    pipe = DiffusionFMPipeline.from_pretrained(model, dtype="float32")
    for lora, scale in loras:
        pipe.load_lora(lora, scale)
    return pipe


@pytest.fixture(scope="module", params=["lora", "dora", "lora+text"])
def adapter(request, tiny_model, tmp_path_factory):
    """(the folder of a LoRA far from nothing, what it draws)."""
    method, _, text = request.param.partition("+")
    pipe = load(tiny_model)
    objective = build(pipe, FinetuneConfig(method=method, rank=2, alpha=3, text_encoder=bool(text)))
    torch.manual_seed(1)
    for weight in objective.weights.values():
        weight.data += 0.1 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("adapter") / request.param
    objective.export(folder)
    drawn = draw(pipe)
    assert np.abs(drawn - draw(load(tiny_model))).max() > 8
    return folder, drawn


@pytest.mark.parametrize("form", ["merged", "kohya"])
def test_exports_draw_the_same_picture(form, adapter, tiny_model, tmp_path):
    folder, expected = adapter
    out = tmp_path / ("model" if form == "merged" else "one.safetensors")
    before = contents(folder)
    assert export(folder, out, form, model=tiny_model) <= 1
    again = load(out) if form == "merged" else load(tiny_model, (out, 1.0))
    assert np.abs(draw(again) - expected).max() <= 1
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and contents(folder) == before
    if form == "kohya":
        keys = list(load_file(out))
        assert {key.split("blocks_0")[0] for key in keys if "lora_te" not in key} >= {"lora_unet_"}
        assert {key.rpartition(".")[2] for key in keys} <= {"weight", "alpha", "dora_scale"}
        assert any("lora_down" in key for key in keys) and not any("lora_A" in key for key in keys)


@pytest.mark.parametrize(("form", "name"), [("merged", "model"), ("kohya", "one.safetensors")])
def test_where_nothing_can_be_written_an_export_says_so_and_leaves_nothing(
    form, name, adapter, tiny_model, tmp_path, no_file_beyond, capsys
):
    command = ["export", str(adapter[0]), "--to", form, "--model", str(tiny_model), "--out"]
    with no_file_beyond(3000):
        assert main([*command, str(tmp_path / name)]) == 2
    assert main([*command, f"/proc/{name}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("error: ") for line in said)
    assert not list(tmp_path.iterdir())


def test_a_merged_scale_is_the_scale(adapter, tiny_model, tmp_path):
    folder, _ = adapter
    export(folder, tmp_path / "half", "merged", model=tiny_model, scale=0.5)
    assert np.abs(draw(load(tmp_path / "half")) - draw(load(tiny_model, (folder, 0.5)))).max() <= 1


def test_files_of_other_tools_load(adapter, tiny_model, tmp_path):
    """ComfyUI's and diffusers' dotted names, a rank that differs by layer, no alpha."""
    folder, expected = adapter
    tensors = as_kohya(read_folder(folder))
    scale = 3 / 2  # alpha over rank, which files without an alpha fold into a matrix
    dotted = {}
    for part, (_, weights) in read_folder(folder).items():
        prefix = "diffusion_model." if part == "transformer" else "text_encoder."
        for key, value in weights.items():
            name = prefix + key.removeprefix("base_model.model.").replace(
                ".lora_magnitude_vector", ".dora_scale"
            )
            dotted[name] = value * scale if "lora_B" in key else value
    first = next(key for key in dotted if key.endswith("lora_A.weight"))
    other = first.replace("lora_A", "lora_B")
    dotted[first] = torch.cat([dotted[first], torch.zeros(1, dotted[first].shape[1])])
    dotted[other] = torch.cat([dotted[other], torch.zeros(dotted[other].shape[0], 1)], dim=1)
    save_file(tensors, tmp_path / "kohya.safetensors")
    save_file({key: value.contiguous() for key, value in dotted.items()}, tmp_path / "dotted.safetensors")
    for name in ("kohya", "dotted"):
        drawn = draw(load(tiny_model, (tmp_path / f"{name}.safetensors", 1.0)))
        assert np.abs(drawn - expected).max() <= 1, name


def test_a_folder_and_a_file_at_once_add_up(adapter, tiny_model, tmp_path):
    folder, expected = adapter
    if "dora" in folder.name:
        pytest.skip("magnitudes do not add up")
    export(folder, tmp_path / "one.safetensors", "kohya", model=tiny_model)
    both = load(tiny_model, (folder, 0.25), (tmp_path / "one.safetensors", 0.75))
    assert np.abs(draw(both) - expected).max() <= 1 and both.loras == {folder.name: 0.25, "one": 0.75}


def test_the_commands_export_and_use(adapter, tiny_model, tmp_path, monkeypatch, capsys):
    folder, _ = adapter
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_model)]
    assert main(["export", str(folder), "--to", "kohya", "--out", "one.safetensors", *model]) == 0
    assert main(["export", f"{folder}:0.8", "--to", "merged", "--out", "mine", *model]) == 0
    assert "loaded back" in capsys.readouterr().out
    draw = ["generate", PROMPT, "--device", "cpu", "--no-metadata", "-o"]
    assert main([*draw, "a.png", *model, "--lora", "one.safetensors:0.8"]) == 0
    assert main([*draw, "b.png", "--model", "mine"]) == 0
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()


def test_exports_refuse_what_they_cannot_do(adapter, tiny_model, tmp_path):
    folder, _ = adapter
    (tmp_path / "there").mkdir()
    for out, form, options, words in (
        ("there", "merged", {}, "is there already"),
        ("x", "gguf", {}, "merged or kohya"),
        ("x.bin", "kohya", {}, "NAME.safetensors"),
        ("x.safetensors", "kohya", {"scale": 0.5}, "no scale"),
        ("x", "merged", {"scale": 9.0}, "scale must be"),
    ):
        with pytest.raises(ValueError, match=words):
            export(folder, tmp_path / out, form, model=tiny_model, **options)
    with pytest.raises(ValueError, match="no LoRA folder"):
        export(tmp_path / "nowhere", tmp_path / "x", model=tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_of_another_model_is_not_merged_into_this_one(tiny_model, tmp_path):
    run = finetune(draw_pictures(tmp_path / "mine", 3), tmp_path / "run", model=tiny_model, **SHORT)
    other = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    other.transformer.patch_out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    assert (run / RECORD).is_file()
    with pytest.raises(ValueError, match="trained on another model"):
        export(run, tmp_path / "merged", model=tmp_path / "other")
    assert export(run, tmp_path / "merged", model=tiny_model) <= 1


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_run_loads_back_what_it_leaves(method, tiny_model, tmp_path, monkeypatch):
    """What does not draw the trained picture is told, and the run is not over; the same command writes it anew."""
    pictures, said = draw_pictures(tmp_path / "mine", 3), []
    options = SHORT | {"method": method, "lr": 0.01}
    write = FullFlowMatching.write if method == "full" else AdapterFlowMatching.write

    def spoil(objective, folder):
        with swapped(objective.weights, {name: value + 0.3 for name, value in objective.weights.items()}):
            write(objective, folder)

    with monkeypatch.context() as patch:
        patch.setattr(FullFlowMatching if method == "full" else AdapterFlowMatching, "write", spoil)
        with pytest.raises(
            ValueError, match="run does not draw, loaded back, what was trained .* run the same"
        ):
            finetune(pictures, tmp_path / "run", model=tiny_model, **options)
    assert "ended" not in json.loads((tmp_path / "run" / RECORD).read_text())
    finetune(pictures, tmp_path / "run", model=tiny_model, say=said.append, **options)
    assert f"loaded back, {tmp_path / 'run'} draws the same picture (within 0 of 255)" in said
    assert json.loads((tmp_path / "run" / RECORD).read_text())["ended"]


# ---- LoRAs that do not fit ---------------------------------------------------------------------------------


def spoiled(folder, tmp_path, how):
    """A kohya file of the adapter with something wrong."""
    tensors = as_kohya(read_folder(folder))
    key = next(key for key in tensors if key.startswith("lora_unet_") and key.endswith("lora_down.weight"))
    if how == "other layer":
        tensors["lora_unet_down_blocks_9_attn.lora_down.weight"] = tensors.pop(key)
    elif how == "other width":
        tensors[key] = torch.zeros(2, 7)
    elif how == "half":
        del tensors[key]
    elif how == "empty":
        tensors = {}
    path = tmp_path / "spoiled.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("other layer", "another model"),
        ("other width", "another model"),
        ("half", "lacks a matrix"),
        ("empty", "no adapter"),
    ],
)
def test_files_that_do_not_fit_are_named(how, words, adapter, tiny_model, tmp_path):
    pipe = load(tiny_model)
    with pytest.raises(ValueError, match=words):
        pipe.load_lora(spoiled(adapter[0], tmp_path, how))
    assert pipe.loras == {}


def test_a_folder_that_lacks_weights_is_refused(adapter, tiny_model, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "lora")
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit this model"):
        load(tiny_model, (folder, 1.0))
    (folder / CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="is not of a LoRA"):
        check_lora(folder)


def test_names_and_files_are_checked_before_anything_is_loaded(tmp_path):
    for name, words in (("a.ckpt", "pickled"), ("a.txt", "is no LoRA"), ("a.safetensors", "cut short")):
        (tmp_path / name).write_bytes(b"x" * 20)
        with pytest.raises(ValueError, match=words):
            parse_lora(f"{tmp_path / name}:0.5")
