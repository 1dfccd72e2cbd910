"""Fine-tuning: what it leaves, that it learns, resumes bit for bit, touches no picture, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusionfm.checkpoint import listing
from diffusionfm.cli import main
from diffusionfm.config import load_config
from diffusionfm.data.folder import pack_folder
from diffusionfm.finetune import RECORD, FinetuneConfig, configure, finetune, run
from diffusionfm.finetune.methods import Adapting, build
from diffusionfm.finetune.pictures import hold_out
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.trainer import TrainingDiverged
from tests.finetune_toys import SHORT, WEIGHTS, contents, draw_pictures, lines
from train.finetune import main as recipe

ROOT = Path(__file__).resolve().parents[1]
CLOCKED = ("images_per_s", "wait_s", "seconds", "mfu", "kwh")  # metrics that depend on the clock


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("mine") / "pictures")


@pytest.fixture(scope="module")
def made(pictures, tiny_model, tmp_path_factory):
    """(the folder of a run of four steps, what was said, the calls of progress)."""
    out, said, calls = tmp_path_factory.mktemp("made") / "style", [], []
    before = contents(pictures), contents(tiny_model)
    result = finetune(
        pictures, out, model=tiny_model, say=said.append, progress=lambda *a: calls.append(a), **SHORT
    )
    assert result == out and (contents(pictures), contents(tiny_model)) == before
    return out, said, calls


def test_a_run_leaves_a_lora_sheets_and_losses(made):
    out, said, calls = made
    text = "\n".join(said)
    assert "12 pictures, 12 with a caption\ncaptions: 12 from .txt files" in text
    assert "11 pictures to train on; validation loss on 1 pictures held out" in text
    assert [call[:2] for call in calls] == [(step, 4) for step in (1, 2, 3, 4)]
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"{k:07d}.png" for k in (0, 2, 4)]
    with Image.open(out / "samples" / "0000004.png") as sheet:
        assert sheet.width > 256  # the model's picture beside the adapted one
        assert "/trainedAlgorithmicMedia" in sheet.info["XML:com.adobe.xmp"]
    last = lines(out)[-1]
    assert last["step"] == 4 and last["change"] > 0
    assert last["validation_loss"] != last["base_validation_loss"] > 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 2, "tiny")
    assert all(key.startswith("base_model.model.blocks.") for key in load_file(out / WEIGHTS))
    assert json.loads((out / RECORD).read_text())["held_out"]
    assert load_config(FinetuneConfig, out / "config.yaml").rank == 2


def test_sheets_tell_the_hash_of_no_weights_but_those_that_drew_all_of_them(made, tiny_model):
    own = DiffusionFMPipeline.from_pretrained(tiny_model).base_hash
    for step, expected in {0: own, 2: None, 4: None}.items():
        with Image.open(made[0] / "samples" / f"{step:07d}.png") as sheet:
            told = json.loads(sheet.info["diffusionfm"])
        assert (told.get("model_hash"), told["prompt"]) == (expected, "a red apple")


def test_only_the_adapter_is_checkpointed(made):
    out, _, _ = made
    saved = load_file(listing(out)[-1] / "lora.safetensors")
    assert saved and all("/lora_" in key for key in saved)


def test_generate_draws_another_picture_with_it(made, tiny_model, tmp_path):
    out, _, _ = made
    command = ["generate", "a red apple", "--model", str(tiny_model), "--device", "cpu", "--no-metadata"]
    drawn = {}
    for scale in ("", ":0", ":0.8", ":4"):
        file = tmp_path / f"scale{scale[1:]}.png"
        extra = ["--lora", f"{out}{scale}"] if scale else []
        assert main([*command, *extra, "-o", str(file)]) == 0
        drawn[scale] = file.read_bytes()
    assert drawn[":0"] == drawn[""] and len({drawn[scale] for scale in ("", ":0.8", ":4")}) == 3
    both, once = ["--lora", f"{out}:0.5", "--lora", f"{out}:0.3"], tmp_path / "both.png"
    assert main([*command, *both, "-o", str(once)]) == 0
    with Image.open(once) as two, Image.open(tmp_path / "scale0.8.png") as one:
        assert np.abs(np.asarray(two, int) - np.asarray(one, int)).max() <= 1  # one LoRA twice: scales add up


def test_the_export_draws_what_the_trained_network_draws(tiny_model, tmp_path):
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    plain = pipe("a red apple").images[0].tobytes()
    objective = build(pipe, FinetuneConfig(rank=2, alpha=3))
    assert pipe("a red apple").images[0].tobytes() == plain  # a new adapter changes nothing
    torch.manual_seed(0)
    for parameter in objective.lora.values():
        parameter.data.normal_()
    adapted = pipe("a red apple").images[0].tobytes()
    with objective.base():
        assert pipe("a red apple").images[0].tobytes() == plain
    assert pipe("a red apple").images[0].tobytes() == adapted != plain
    assert all(parameter.requires_grad for parameter in objective.lora.values())
    objective.export(tmp_path)
    fresh = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    fresh.load_lora(tmp_path)
    assert fresh("a red apple").images[0].tobytes() == adapted


def test_resumed_twice_equals_uninterrupted(pictures, tiny_model, tmp_path):
    def config(name):
        cfg = configure(pictures, tmp_path / name, model=str(tiny_model), **SHORT | {"steps": 6, "lr": 0.01})
        cfg.prior, cfg.prior_pictures, cfg.own_prompts = 0.5, 3, ["a red apple", "yellow star"]
        cfg.trainer.validate_every = 1
        return cfg

    whole, out, calls = tmp_path / "whole", tmp_path / "parts", []

    def stop_at(*steps):
        return lambda step, *_: calls.append(step) or step in steps

    run(config("whole"))
    for stop in (2, 3, 6, 6):
        run(config("parts"), stop_at(stop))
    assert calls == [1, 2, 3, 4, 5, 6]
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for name in ("0000000.png", "0000004.png", "0000006.png"):
        assert (out / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()
    timeless = [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines(out)]
    assert timeless == [{k: v for k, v in x.items() if k not in CLOCKED} for x in lines(whole)]
    records = [json.loads((folder / RECORD).read_text()) for folder in (whole, out)]
    assert records[0] == records[1] and records[0]["ended"]["step"] == 6


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(pictures, tiny_model, tmp_path):
    """The recipe as people start it, killed hard in start-up, in training, while it saves, draws or validates."""
    keys = {"data": pictures, "model": tiny_model, "rank": 2, "trainer.lr": 0.01, "trainer.device": "cpu"}
    keys |= {"trainer.steps": 60, "trainer.checkpoint_every": 5, "trainer.validate_every": 10}
    keys |= {"trainer.sample_every": 20, "prior": 0.5, "prior_pictures": 3}
    config = [sys.executable, "train/finetune.py", "configs/finetune/laptop.yaml"]
    config += [f"{key}={value}" for key, value in keys.items()]

    def begin(out):
        return subprocess.Popen([*config, f"trainer.output_dir={out}"], cwd=ROOT, stdout=subprocess.DEVNULL)

    whole, out, dice = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    assert begin(whole).wait() == 0
    reached = []
    for kill in range(6):
        process, before, deadline = begin(out), listing(out), time.monotonic() + 120
        while process.poll() is None and listing(out) == before and time.monotonic() < deadline:
            time.sleep(0.01)
            if kill == 0 and (out / RECORD).is_file():
                break
        time.sleep(dice.random() * 0.3)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        reached.append(len(lines(out)) if (out / "metrics.jsonl").is_file() else 0)
    assert begin(out).wait() == 0
    assert reached == sorted(reached) and 0 < reached[1] < 60
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert [line["step"] for line in lines(out)] == list(range(1, 61)) and not list(out.rglob("*.tmp"))
    records = [json.loads((folder / RECORD).read_text()) for folder in (whole, out)]
    assert records[0] == records[1] and records[0]["ended"]["step"] == 60


def test_a_run_asked_for_fewer_steps_than_it_took_says_so(made, pictures, tiny_model, tmp_path):
    out, said = shutil.copytree(made[0], tmp_path / "style"), []
    assert "it took all 4 steps; the report is" in made[1][-1]
    finetune(pictures, out, model=tiny_model, say=said.append, **SHORT | {"steps": 2})
    assert "it had taken 4 steps before, more than the 2 asked for now; the report is" in said[-1]
    assert "It had taken 4 steps before" in (out / "report.html").read_text()


def test_it_learns(pictures, tiny_model, tmp_path):
    settings = SHORT | {"steps": 60, "batch_size": 16, "sample_every": 0, "lr": 0.01, "rank": 8}
    last = lines(finetune(pictures, tmp_path / "style", model=tiny_model, **settings))[-1]
    assert last["validation_loss"] < 0.9 * last["base_validation_loss"]


def test_shards_and_few_pictures(tiny_model, tmp_path):
    folder = draw_pictures(tmp_path / "few", 3)
    pack_folder(folder, tmp_path / "shards", size=48, held_out=0)
    said: list[str] = []
    finetune(
        tmp_path / "shards", tmp_path / "style", model=tiny_model, say=said.append, **SHORT | {"steps": 1}
    )
    assert "3 pictures, 3 with a caption" in said[0]
    assert "3 pictures to train on; validation loss on the training pictures" in "\n".join(said)


def test_hold_out_follows_the_shards_or_takes_a_tenth():
    samples = [{"key": str(k), "heldout": False} for k in range(25)]
    train, held = hold_out(samples, seed=0)
    assert (len(train), len(held)) == (23, 2) and hold_out(samples, seed=0) == (train, held)
    assert hold_out(samples[:9], seed=0) == (samples[:9], [])
    samples[3]["heldout"] = True
    assert hold_out(samples, seed=0)[1] == [samples[3]]


def test_every_picture_of_a_large_set_is_trained_on_or_held_out():
    samples = [{"key": str(k), "heldout": False} for k in range(2000)]
    train, held = hold_out(samples, seed=0)
    assert (len(train), len(held)) == (1936, 64)
    assert sorted(int(sample["key"]) for sample in train + held) == list(range(2000))


def test_captions_from_file_names(tiny_model, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 3)
    (folder / "circle 01.txt").unlink()
    for k in (0, 2):
        (folder / f"circle {k:02d}.txt").write_text("ein Kreis und ein Hut")
    said: list[str] = []
    finetune(
        folder, tmp_path / "style", model=tiny_model, captions="name", say=said.append, **SHORT | {"steps": 1}
    )
    assert "2 from .txt files, 1 from file names" in "\n".join(said)
    assert any("likely German" in line for line in said)


def test_another_run_in_the_same_folder_is_refused(made, pictures, tiny_model, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "style")
    before = contents(out)
    other = shutil.copytree(pictures, tmp_path / "other")
    (other / "circle 01.txt").write_text("something else")
    with pytest.raises(ValueError, match="trained on other pictures or captions"):
        finetune(other, out, model=tiny_model, **SHORT)
    with pytest.raises(ValueError, match="begun with rank 2, not 4"):
        finetune(pictures, out, model=tiny_model, **SHORT | {"rank": 4})
    model = shutil.copytree(tiny_model, tmp_path / "model")
    pipe = DiffusionFMPipeline.from_pretrained(model)
    pipe.transformer.patch_out.bias.data += 1
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match="trained on another model"):
        finetune(pictures, out, model=model, **SHORT)
    assert contents(out) == before


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(pictures, tiny_model, tmp_path):
    """It would remove the checkpoints and metrics that the first writes."""
    out, refused = tmp_path / "style", []

    def again(step, *_):
        before = contents(out)
        with pytest.raises(ValueError, match="another process is writing to .*style: wait for it, or use"):
            finetune(pictures, out, model=tiny_model, **SHORT)
        refused.append(contents(out) == before)

    finetune(pictures, out, model=tiny_model, progress=again, **SHORT | {"steps": 2})
    assert refused == [True, True] and [line["step"] for line in lines(out)] == [1, 2]
    finetune(pictures, out, model=tiny_model, **SHORT)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("lr, error", [(1e-30, "changes nothing after"), (float("nan"), "lr must be")])
def test_an_adapter_that_does_nothing(lr, error, pictures, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=error):
        finetune(pictures, tmp_path / "style", model=tiny_model, **SHORT | {"lr": lr, "steps": 1})


def test_nan_stops_names_the_pictures_and_says_what_can_be_done(pictures, tiny_model, tmp_path, monkeypatch):
    """One picture spoils the batches it is in; what the message advises is then taken."""
    ends = Adapting.ends

    def spoiled(self, batch, x0, *more):
        x0, noise = ends(self, batch, x0, *more)
        bad = torch.tensor([key == "circle 03.jpg" for key in batch["key"]]).reshape(-1, 1, 1, 1)
        return torch.where(bad, torch.nan, x0), noise

    out, calls = tmp_path / "style", []
    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged) as caught:
        patch.setattr(Adapting, "ends", spoiled)
        finetune(pictures, out, model=tiny_model, progress=lambda *a: calls.append(a), **SHORT)
    words = str(caught.value)
    assert f"loss nan, gradient norm nan at step {calls[-1][0]}" in words and "circle 03.jpg" in words
    assert words.count("circle") == SHORT["batch_size"] and "trainer.lr" not in words
    assert words.endswith("take a lower --lr and a new --out")
    finetune(pictures, tmp_path / "lower", model=tiny_model, **SHORT | {"lr": 5e-4})


def test_the_recipe_and_the_command_are_the_same_run(pictures, tiny_model, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--steps", "2", "--rank", "2", "--lr", "0.001"]
    assert main(["finetune", str(pictures), "--out", str(tmp_path / "a"), *common]) == 0
    assert "12 with a caption" in capsys.readouterr().out
    keys = {"data": pictures, "model": tiny_model, "rank": 2, "trainer.steps": 2}
    keys |= {"trainer.output_dir": tmp_path / "b"}
    config = str(ROOT / "configs/finetune/laptop.yaml")
    assert recipe([config, *(f"{key}={value}" for key, value in keys.items())]) == tmp_path / "b"
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    cfg = load_config(FinetuneConfig, config)
    assert (cfg.rank, cfg.trainer.lr) == (FinetuneConfig().rank, FinetuneConfig().trainer.lr)


def test_the_recipe_and_the_command_train_all_weights_at_one_rate(pictures, tiny_model, tmp_path):
    common = ["--model", str(tiny_model), "--steps", "1", "--method", "full", "--quiet"]
    assert main(["finetune", str(pictures), "--out", str(tmp_path / "a"), *common]) == 0
    keys = {"data": pictures, "model": tiny_model, "trainer.steps": 1, "method": "full"}
    keys |= {"trainer.output_dir": tmp_path / "b"}
    recipe([str(ROOT / "configs/finetune/laptop.yaml"), *(f"{key}={value}" for key, value in keys.items())])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


@pytest.mark.parametrize(
    ("words", "lr"),
    [
        (["configs/finetune/gpu.yaml", "method=full"], 5e-5),
        (["method=full"], 1e-4),
        (["method=dora"], 1e-3),
        (["configs/finetune/gpu.yaml", "method=full", "trainer.lr=1e-3"], 1e-3),
        (["own.yaml"], 2e-4),
        (["own.yaml", "method=lora"], 2e-4),
    ],
)
def test_a_rate_that_somebody_chose_is_taken_as_it_is(words, lr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "own.yaml").write_text(
        "base: configs/finetune/laptop.yaml\nmethod: full\ntrainer: {lr: 2.0e-4}\n"
    )
    monkeypatch.setattr("train.finetune.run", lambda cfg: cfg)
    assert recipe(words).trainer.lr == pytest.approx(lr)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    pictures, tiny_model, tmp_path, no_file_beyond, capsys
):
    command = ["finetune", str(pictures), "--out", str(tmp_path / "style"), "--model", str(tiny_model)]
    command += ["--steps", "2", "--rank", "2", "--quiet"]
    # What does not fit: the report on the pictures, the record, the model's own pictures, the checkpoint.
    for most, *check in ((100, "--check"), (100,), (3_000,), (14_000,)):
        with no_file_beyond(most):
            assert main([*command, *check]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: could not write") and error.count("\n") == 1
        assert "free some disk space and run again" in error
    assert main(command) == 0 and (tmp_path / "style" / WEIGHTS).is_file()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def no_captions(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()


def one_missing(folder: Path) -> None:
    (folder / "circle 01.txt").unlink()


def corrupt(folder: Path) -> None:
    for path in [*folder.glob("*.png"), *folder.glob("*.jpg")]:
        path.write_bytes(b"no picture")


BAD = {
    "empty folder": (empty, [], "no usable picture"),
    "no captions": (no_captions, [], "have no caption"),
    "no captions, skipped": (no_captions, ["--captions", "skip"], "no usable picture"),
    "one caption missing": (one_missing, [], "circle 01.png"),
    "corrupt": (corrupt, [], "no usable picture"),
    "steps": (None, ["--steps", "0"], "steps must be"),
    "too many steps": (None, ["--steps", "1000000000"], "steps must be a whole number from 1 to 100,000"),
    "rank": (None, ["--rank", "-3"], "rank must be"),
    "rank above width": (None, ["--rank", "64"], "narrowest layer"),
    "lr": (None, ["--lr", "5"], "lr must be"),
    "seed": (None, ["--seed", "-1"], "seed must be"),
    "out in data": (None, ["--out", "mine/style"], "lie in one another"),
    "out is the data": (None, ["--out", "mine"], "lie in one another"),
    "out is a file": (None, ["--out", "file"], "is a file"),
    "out holds other files": (None, ["--out", "other"], "holds other files"),
    "out below a file": (None, ["--out", "file/style"], "is a file"),
    "out where nobody writes": (None, ["--out", "/proc/style"], "cannot be written"),
    "trigger missing": (None, ["--captions", "trigger"], "stands for a trigger word"),
    "trigger of two words": (None, ["--trigger", "my dog"], "one short word"),
    "prior": (None, ["--prior", "-1"], "prior must be"),
    "patience": (None, ["--patience", "-1"], "patience must be"),
    "prompt": (None, ["--prompt", " "], "prompt is empty"),
    "no GPU": (None, ["--preset", "gpu"], "no device 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line_exit_2_and_leave_nothing(name, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = draw_pictures(tmp_path / "mine", 3)
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep me")
    damage, arguments, words = BAD[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    if damage:
        damage(folder)
    before = contents(tmp_path)
    assert main(["finetune", "mine", "--out", "style", "--model", str(tiny_model), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert contents(tmp_path) == before and not (tmp_path / "style").exists()
