"""The ways to adapt: LoRA, DoRA, all weights, the text encoder; a subject's trigger; early stop; what was forgotten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusionfm.checkpoint import listing
from diffusionfm.cli import main
from diffusionfm.cli.training import METHODS, PRESETS
from diffusionfm.data.captions import CHOICES
from diffusionfm.finetune import RECORD, FinetuneConfig, configure, finetune, load_preset, run, settings
from diffusionfm.finetune.judge import SHEET_CELL, Judge
from diffusionfm.finetune.methods import Best, build
from diffusionfm.finetune.pictures import class_prompts, collate, mixture, own_prompts, with_trigger
from diffusionfm.finetune.report import Outcome, verdict
from diffusionfm.images import contact_sheet
from diffusionfm.pipeline import DiffusionFMPipeline
from tests.finetune_toys import SHORT, WEIGHTS, contents, draw_pictures, lines

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("mine") / "pictures")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGBa")).astype(int)


def trained(model: Path, cfg: FinetuneConfig, scale: float = 1.0):
    """(objective, its pipeline) with every trained weight moved a little, as training would."""
    pipe = DiffusionFMPipeline.from_pretrained(model, dtype="float32")
    objective = build(pipe, cfg)
    torch.manual_seed(0)
    for weight in objective.weights.values():
        weight.data += 0.1 * scale * torch.randn_like(weight)
    return objective, pipe


@pytest.mark.parametrize("method", settings.METHODS)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_every_method_exports_what_it_draws_and_gives_the_base_back(
    method, text_encoder, tiny_model, tmp_path
):
    cfg = FinetuneConfig(method=method, rank=2, alpha=3, text_encoder=text_encoder)
    plain = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")("a red apple").images[0]
    objective, pipe = trained(tiny_model, cfg)
    adapted = pipe("a red apple").images[0]
    assert np.abs(pixels(adapted) - pixels(plain)).max() > 1
    with objective.base():
        assert pipe("a red apple").images[0].tobytes() == plain.tobytes()
    assert pipe("a red apple").images[0].tobytes() == adapted.tobytes()
    objective.export(tmp_path)
    assert (tmp_path / "text_encoder").is_dir() == (text_encoder or method == "full")
    if method == "full":
        again = DiffusionFMPipeline.from_pretrained(tmp_path, dtype="float32")
    else:
        again = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
        again.load_lora(tmp_path)
    assert np.abs(pixels(again("a red apple").images[0]) - pixels(adapted)).max() <= 1


@pytest.mark.parametrize("options", [{"method": "dora"}, {"method": "full"}, {"text_encoder": True}])
def test_every_method_learns_and_goes_on(options, pictures, tiny_model, tmp_path):
    chosen = SHORT | {"steps": 8, "sample_every": 0, "lr": 0.01, "batch_size": 8} | options
    finetune(pictures, tmp_path / "whole", model=tiny_model, **chosen)
    last = lines(tmp_path / "whole")[-1]
    assert last["validation_loss"] < last["base_validation_loss"] and last["change"] > 0
    for stop in (3, 0):
        finetune(
            pictures, tmp_path / "parts", model=tiny_model, progress=lambda s, *_, at=stop: s == at, **chosen
        )
    name = "transformer/diffusion_pytorch_model.safetensors" if options.get("method") == "full" else WEIGHTS
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    if "text_encoder" in options:
        moved = load_file(tmp_path / "whole/text_encoder" / WEIGHTS)
        assert any(value.abs().max() > 0 for key, value in moved.items() if "lora_B" in key)


def test_a_dora_at_scale_nought_is_the_model_and_at_one_itself(tiny_model, tmp_path):
    objective, pipe = trained(tiny_model, FinetuneConfig(method="dora", rank=2))
    adapted = pixels(pipe("a red apple").images[0])
    with objective.base():
        plain = pixels(pipe("a red apple").images[0])
    objective.export(tmp_path)
    drawn = {}
    for scale in (0.0, 0.5, 1.0):
        again = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
        again.load_lora(tmp_path, scale)
        drawn[scale] = pixels(again("a red apple").images[0])
    assert np.abs(drawn[0.0] - plain).max() <= 1 and np.abs(drawn[1.0] - adapted).max() <= 1
    assert min(np.abs(drawn[0.5] - other).max() for other in (plain, adapted)) > 0


def test_full_leaves_a_model_to_draw_with(pictures, tiny_model, tmp_path, capsys):
    command = ["finetune", str(pictures), "--out", str(tmp_path / "mine"), "--model", str(tiny_model)]
    assert main([*command, "--method", "full", "--steps", "2"]) == 0
    assert f"--model {tmp_path / 'mine'}" in capsys.readouterr().out
    assert lines(tmp_path / "mine")[0]["lr"] < configure("", "").trainer.lr / 10
    use = ["generate", "a red apple", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main([*use, "--model", str(tmp_path / "mine")]) == 0
    assert main([*use, "--model", str(tiny_model), "--lora", str(tmp_path / "mine")]) == 2
    assert "is a whole model" in capsys.readouterr().err


def test_targets_attention_adapts_less(tiny_model):
    sizes = {
        t: len(trained(tiny_model, FinetuneConfig(rank=2, targets=t))[0].weights) for t in settings.TARGETS
    }
    assert 0 < sizes["attention"] < sizes["all"]


# ---- subjects ------------------------------------------------------------------------------------------------


def test_the_trigger_takes_its_place_or_goes_first():
    assert with_trigger("a [trigger] in the rain", "zkw") == "a zkw in the rain"
    assert with_trigger("a dog", "zkw") == "zkw, a dog"
    assert with_trigger("ZKW the dog", "zkw") == "ZKW the dog"
    assert with_trigger("a photo of zkw, smiling", "zkw") == "a photo of zkw, smiling"
    assert with_trigger("a dog of [trigger]", "dog") == "a dog of dog"
    assert with_trigger("two zkws", "zkw") == "zkw, two zkws"
    assert with_trigger("a dog", "") == "a dog"


def test_a_subject_with_a_trigger_and_prior_pictures(tiny_model, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 4)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "circle 01.txt").write_text("a photo of [trigger]")
    said: list[str] = []
    out = tmp_path / "subject"
    cfg = configure(
        folder, out, model=str(tiny_model), captions="trigger", trigger="zkw", prior=1.0, prior_pictures=3,
        **SHORT | {"prompts": ["a [trigger] on white"]},
    )  # fmt: skip
    run(cfg, say=said.append)
    text = "\n".join(said)
    assert "captions: 3 from the trigger alone, 1 from .txt files" in text
    assert "4 pictures to train on and 3 of the model's own" in text
    assert json.loads((out / RECORD).read_text())["trigger"] == "zkw"
    assert "own prompts and of 'a photo' and the like" in text
    assert load_file(out / "own.safetensors")["latent"].shape[0] == len(cfg.own_prompts) + 1 + 3
    with pytest.raises(ValueError, match="begun with trigger zkw, not abc"):
        cfg.trigger = "abc"
        run(cfg, say=said.append)
    with pytest.raises(ValueError, match=r"captions hold \[trigger\]"):
        finetune(folder, tmp_path / "other", model=tiny_model, captions="name", **SHORT)


def test_prior_pictures_are_of_the_subject_s_class_too():
    """The captions of the subject without its name: else "a face" would be learned as the subject's face."""
    captions = [
        "a face of zkw with sad eyes",
        "zkw, a face",
        "a ZKW dog",
        "zkw",
        "a face of zkws",
        "a face of ZKW.",
    ]
    classes = class_prompts([{"captions": captions[:3]}, {"captions": captions[3:]}], "zkw")
    assert classes == ["a face with sad eyes", "a face", "a dog", "a face of zkws"]
    assert class_prompts([{"captions": captions}], "") == []
    cfg = FinetuneConfig(own_prompts=["a cat", "a tree", "a key"], trigger="zkw", prior_pictures=9)
    assert own_prompts(cfg, classes) == (["a cat", "a tree", "a key", "a face with sad eyes", "a dog"], [])
    cfg.prior = 0.5
    own = ["a cat", "a tree", "a key"]
    assert own_prompts(cfg, classes)[1] == [*own * 2, *classes[:3]]
    assert own_prompts(cfg, ["a dog"])[1] == [*own * 2, *["a dog"] * 3]
    assert own_prompts(cfg, []) == (own, own * 3)


def test_a_subject_whose_captions_name_no_class_is_told_so(tiny_model, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    said: list[str] = []
    subject = SHORT | {"steps": 1, "captions": "trigger", "trigger": "zkw"}
    finetune(folder, tmp_path / "out", model=tiny_model, prior=1.0, say=said.append, **subject)
    assert any("no caption names what zkw is: say 'a dog of [trigger]'" in line for line in said)


@pytest.mark.parametrize("method", settings.METHODS)
def test_the_model_s_own_pictures_train_towards_what_it_says_of_them(method, tiny_model):
    """An adapter that changes nothing has no loss on them; one that does has, and the others' loss is no other."""
    cfg = FinetuneConfig(method=method, rank=2, objective={"prompt_dropout": 0.0})
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    objective = build(pipe, cfg)
    torch.manual_seed(1)
    latents = torch.randn(4, *pipe.vae.encode(torch.rand(1, 4, 32, 32)).shape[1:])
    samples = [
        {"key": f"{k}", "latent": latent, "captions": ["a red apple"], "own": True}
        for k, latent in enumerate(latents)
    ]

    def loss(own: int) -> float:
        torch.manual_seed(2)
        mine = [sample | {"own": k < own} for k, sample in enumerate(samples)]
        return objective(collate(mine))[0].item()

    plain = loss(0)
    assert loss(4) < 1e-9 * plain and loss(2) < plain
    for weight in objective.weights.values():
        weight.data += 0.1 * torch.randn_like(weight)
    assert loss(4) > 1e-4 * plain and loss(0) != loss(4)


def test_prior_pictures_come_as_often_as_their_weight():
    assert mixture([{}] * 4, [{}] * 8, 1.0) == [1.0] * 4 + [0.5] * 8
    assert mixture([{}] * 4, [], 1.0) is None


# ---- watching ------------------------------------------------------------------------------------------------


def test_best_keeps_the_lowest_and_survives_a_checkpoint():
    weights = {"a.b": torch.nn.Parameter(torch.zeros(2))}
    best = Best(weights)
    with best.in_place(weights):
        assert weights["a.b"].tolist() == [0, 0]
    for step, loss in enumerate((3.0, 1.0, 2.0, float("nan")), 1):
        weights["a.b"].data.fill_(step)
        assert best.offer(step, loss, weights) == (loss in (3.0, 1.0))
    again = Best(weights)
    again.load_state_dict(best.state_dict())
    with again.in_place(weights):
        assert weights["a.b"].tolist() == [2, 2]
    assert weights["a.b"].tolist() == [4, 4] and int(again.step) == 2


def test_early_stop_keeps_the_best_step_and_says_why(pictures, tiny_model, tmp_path):
    """A learning rate at which training soon makes everything worse."""
    said: list[str] = []
    cfg = configure(pictures, tmp_path / "style", model=str(tiny_model), **SHORT | {"steps": 60, "lr": 0.1})
    cfg.trainer.validate_every, cfg.trainer.warmup, cfg.trainer.ema, cfg.patience = 1, 0, 0, 3
    run(cfg, say=said.append)
    record = json.loads((tmp_path / "style" / RECORD).read_text())
    best, last = record["results"]["best_step"], record["ended"]["step"]
    assert record["ended"]["early"] and last == best + 3 < 60
    losses = {line["step"]: line["validation_loss"] for line in lines(tmp_path / "style")}
    assert min(losses, key=lambda step: losses[step]) == best
    assert f"no better validation loss since step {best}" in said[-1]
    assert (tmp_path / "style/samples" / f"{best:07d}.png").is_file()
    kept = load_file(listing(tmp_path / "style")[-1] / "best.safetensors")
    exported = load_file(tmp_path / "style" / WEIGHTS)
    for key, value in exported.items():
        name = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(value, kept[name.replace(".", "/")])
    before = contents(tmp_path / "style")
    run(cfg, say=said.append)
    assert "is done: stopped at step" in said[-1] and contents(tmp_path / "style") == before


def outcome(**last: float) -> Outcome:
    best = {"validation_loss": 0.4, "base_validation_loss": 0.5, "seen_loss": 0.4, "own_loss": 0.2}
    best |= {"base_own_loss": 0.2, "base_seen_loss": 0.5}
    return Outcome(50, 100, best | last, {**best, "validation_loss": 0.45, "seen_loss": 0.3} | last)


def test_the_verdict_says_what_the_numbers_say():
    words = "\n".join(verdict(outcome(), held_out=True))
    assert "It learned: the loss on pictures it had not seen fell by 20.0%" in words
    assert "After step 50 it began to learn the pictures by heart" in words and "still knows" in words
    assert "hardly learned" in verdict(outcome(validation_loss=0.499), held_out=True)[0]
    words = "\n".join(verdict(outcome(validation_loss=0.6, own_loss=0.3), held_out=True))
    assert "did not learn:" in words and "forgot much" in words and "--prior 1" in words
    words = "\n".join(verdict(outcome(own_loss=0.22), held_out=False))
    assert "forgot some" in words and "cannot be told" in words


def test_the_report_stands_alone_and_escapes_what_users_write(tiny_model, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 12)
    (folder / "circle 01.png").rename(folder / "<script>alert(1)<script>.png")
    (folder / "<script>alert(1)<script>.txt").write_text("<img src=x onerror=alert(2)>")
    (folder / "<b>.png").write_bytes(b"no picture")
    out = finetune(folder, tmp_path / "style", model=tiny_model, **SHORT)
    page = (out / "report.html").read_text()
    assert "<script" not in page and "&lt;b&gt;.png" in page and "onerror=alert(2)>" not in page
    assert "http:" not in page.replace("http://www.w3.org", "") and "https:" not in page
    assert page.count("data:image/png;base64,") == 4 and "<svg" in page  # three sheets and the preflight
    assert "<p class=verdict>It " in page
    for words in ("trainer.lr", "13 pictures, 12 with a caption", "held out", "the model&#x27;s own"):
        assert words in page, words
    assert (out / "preflight.png").is_file()
    assert json.loads((out / "preflight.json").read_text())["found"] == 13


# ---- data ----------------------------------------------------------------------------------------------------


def test_a_zip_and_a_tar_train_as_their_folder_does(pictures, tiny_model, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "mine")
    (folder / "circle 01.txt").unlink()
    with (
        zipfile.ZipFile(tmp_path / "mine.zip", "w") as zipped,
        tarfile.open(tmp_path / "mine.tar", "w") as tar,
    ):
        for path in sorted(folder.iterdir()):
            zipped.write(path, f"mine/{path.name}")
            tar.add(path, path.name)
    trained = {}
    for name in ("mine", "mine.zip", "mine.tar"):
        said: list[str] = []
        out = tmp_path / f"style of {name}"
        short = SHORT | {"steps": 1, "captions": "trigger", "trigger": "zkw"}
        finetune(tmp_path / name, out, model=tiny_model, say=said.append, **short)
        assert said[0].startswith(f"{tmp_path / name}: 12 pictures, 11 with a caption")
        assert "no caption: circle 01.png" in said[0]
        trained[name] = (out / WEIGHTS).read_bytes(), json.loads((out / RECORD).read_text())["data"]
    assert trained["mine"] == trained["mine.zip"] == trained["mine.tar"]


def test_pictures_beside_a_shard_are_refused(pictures, tiny_model, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "mine")
    with tarfile.open(folder / "backup.tar", "w") as tar:
        tar.add(pictures, ".")
    command = ["finetune", str(folder), "--out", str(tmp_path / "out"), "--model", str(tiny_model), "--check"]
    assert main(command) == 2
    assert "mine holds pictures (circle 00.jpg) and a shard (backup.tar)" in capsys.readouterr().err
    (folder / "backup.tar").rename(folder / ".backup.tar")
    assert main(command) == 0


def test_an_imagefolder_is_judged_on_its_own_validation_split(pictures, tiny_model, tmp_path):
    for split, pattern in {"train": "circle 0*", "validation": "circle 1*"}.items():
        (tmp_path / "mine" / split).mkdir(parents=True)
        for path in pictures.glob(pattern):
            shutil.copy(path, tmp_path / "mine" / split)
    out = finetune(tmp_path / "mine", tmp_path / "style", model=tiny_model, **SHORT | {"steps": 1})
    held = json.loads((out / RECORD).read_text())["held_out"]
    assert held == ["validation/circle 10.png", "validation/circle 11.png"]


def test_check_reports_and_trains_nothing(pictures, tiny_model, tmp_path, capsys):
    out = tmp_path / "style"
    command = ["finetune", str(pictures), "--out", str(out), "--model", str(tiny_model)]
    before = contents(pictures)
    assert main([*command, "--check"]) == 0
    assert "12 pictures, 12 with a caption" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["preflight.json", "preflight.png"]
    (pictures / "circle 12.png").write_bytes((pictures / "circle 01.png").read_bytes() + b"x")
    assert main([*command, "--check"]) == 2
    captured = capsys.readouterr()
    assert "no caption: circle 12.png" in captured.out and "write NAME.txt beside each" in captured.err
    (pictures / "circle 12.png").unlink()
    assert main([*command, "--steps", "1"]) == 0 and contents(pictures) == before


# ---- sheets --------------------------------------------------------------------------------------------------


def test_sheets_show_the_base_model_s_picture_and_then_the_adapted_one(tiny_model, tmp_path):
    objective, pipe = trained(tiny_model, FinetuneConfig(rank=2))
    adapted = pipe("a red apple", seed=0).images[0]
    with objective.base():
        plain = pipe("a red apple", seed=0).images[0]
        latent = pipe.vae.encode(torch.rand(1, 4, 32, 32))[0].detach()
    sets = dict.fromkeys(("validation", "seen", "own"), [{"key": "a", "latent": latent, "captions": ["a"]}])
    Judge(pipe, objective, sets, ["a red apple"], tmp_path).draw(3)
    with Image.open(tmp_path / "samples" / "0000003.png") as sheet:
        drawn = pixels(sheet)
    labels = ["a red apple", "step 3"]
    far = {}
    for name, pair in {
        "right": (plain, adapted),
        "base twice": (plain, plain),
        "turned": (adapted, plain),
    }.items():
        sheet = contact_sheet(pair, labels, columns=2, cell=SHEET_CELL)
        far[name] = np.abs(drawn - pixels(sheet)).max()
    assert far["right"] <= 2 and min(far["base twice"], far["turned"]) > 8


# ---- presets -------------------------------------------------------------------------------------------------


def test_presets_load_and_the_command_knows_them():
    laptop, gpu, many = (load_preset(name) for name in PRESETS)
    default = FinetuneConfig()
    assert laptop == default
    assert laptop.rank < gpu.rank and laptop.trainer.batch_size < gpu.trainer.batch_size
    assert gpu.trainer.batch_size < many.trainer.batch_size and many.trainer.device == "cuda"
    assert settings.METHODS == METHODS and settings.PRESETS == PRESETS and "trigger" in CHOICES
    with pytest.raises(ValueError, match="unknown preset"):
        load_preset("phone")


def test_the_gpu_preset_trains_on_a_cpu_too(pictures, tiny_model, tmp_path):
    """With all its settings but the device, the steps and, the tiny model being narrow, the rank."""
    out, small = tmp_path / "style", {"steps": 1, "rank": 2, "device": "cpu"}
    cfg = configure(pictures, out, preset="gpu", model=str(tiny_model), prompts=["a red apple"], **small)
    run(cfg)
    preset = load_preset("gpu").trainer
    assert (cfg.trainer.batch_size, cfg.trainer.lr, cfg.trainer.ema) == (
        preset.batch_size,
        preset.lr,
        preset.ema,
    )
    last = lines(out)[-1]
    assert (last["step"], last["samples"]) == (1, preset.batch_size) and last["change"] > 0


# ---- many processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_train_one_lora_and_stop_early_together(pictures, tiny_model, tmp_path):
    settings = {"data": pictures, "model": tiny_model, "rank": 2, "patience": 3, "prompts": "[a red apple]"}
    settings |= {"trainer.output_dir": tmp_path / "style", "trainer.device": "cpu", "trainer.steps": 60}
    settings |= {"trainer.batch_size": 4, "trainer.lr": 0.1, "trainer.ema": 0, "trainer.warmup": 0}
    settings |= {"trainer.validate_every": 1, "trainer.checkpoint_every": 10, "trainer.tracker": "none"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["train/finetune.py", "configs/finetune/multi-gpu.yaml"]
    command += [f"{key}={value}" for key, value in settings.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "style" / RECORD).read_text())
    assert record["ended"]["early"] and record["ended"]["step"] <= record["results"]["best_step"] + 4
    assert [line["samples"] for line in lines(tmp_path / "style")][:2] == [4, 8]
    assert (tmp_path / "style" / "report.html").is_file()
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    pipe.load_lora(tmp_path / "style")
