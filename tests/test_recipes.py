"""Every shipped config: two real steps, going on from there, the files a run leaves, and mistakes in one line."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from diffusionfm.data.shapes import build_shapes, shape_samples
from diffusionfm.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
# Recipe config -> (recipe, the configs it builds on, overrides that make it short).
SHORT = ("trainer.steps=2", "trainer.batch_size=2", "trainer.grad_accum=2", "trainer.compile=false")
CONFIGS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tokenizer": ("tokenizer", (), ()),
    "vae": ("vae", (), (*SHORT, "validation_pictures=4", "statistics_pictures=4")),
    "upscaler": ("upscaler", ("vae",), (*SHORT, "validation_pictures=2")),
    "text_encoder": ("text_encoder", ("tokenizer",), (*SHORT, "candidates=4")),
    "precompute": ("precompute", ("vae",), ()),
}
DENOISER = (*SHORT, "sample.steps=2", "sample.prompts=[a red heart]", "validation_latents=4")
for name in ("denoiser", "unet"):
    CONFIGS[name] = ("denoiser", ("text_encoder", "precompute"), DENOISER)
# The sources that the shipped mixture names: the toy shards bear their names.
MIXTURE = yaml.safe_load((ROOT / "configs/icons/denoiser.yaml").read_text())["data"].get("weights", {})
SOURCES = [*(name for name in MIXTURE if name != "default"), "other"]
ALL = [f"{family}/{name}" for family in ("tiny", "icons") for name in CONFIGS]


class House:
    """A folder that looks like the repository's root, with toy shards where the configs look for theirs."""

    def __init__(self, root: Path) -> None:
        self.root, self.said = root, dict[str, str]()
        for name in ("train", "configs"):
            (root / name).symlink_to(ROOT / name)
        build_shapes(root / "runs/tiny/shards", count=60)
        for larger in ("runs/tiny/shards-128", "data/icons-512"):
            build_shapes(root / larger, count=60, size=128)
        with ShardWriter(root / "data/icons") as writer:
            for k, (key, picture, caption, meta) in enumerate(shape_samples(100, 64, seed=0)):
                writer.write(key, picture, caption, {**meta, "source": SOURCES[k % len(SOURCES)]})

    def run(self, recipe: str, *args: str) -> str:
        """Run a recipe's main here; gives what it printed."""
        before = Path.cwd()
        os.chdir(self.root)
        try:
            with redirect_stdout(io.StringIO()) as out:
                importlib.import_module(f"train.{recipe}").main([*args])
        finally:
            os.chdir(before)
        return out.getvalue()

    def made(self, config: str, *extra: str) -> str:
        """What a shipped config printed in its first two steps here, those it builds on having run before."""
        if config not in self.said:
            family, name = config.split("/")
            recipe, before, overrides = CONFIGS[name]
            for other in before:
                self.made(f"{family}/{other}")
            self.said[config] = self.run(recipe, f"configs/{config}.yaml", *overrides)
        return self.said[config]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


@pytest.mark.parametrize("config", ALL)
def test_every_shipped_config_runs(house, config):
    house.made(config)
    family, name = config.split("/")
    run = house.root / "runs" / family / name
    if name == "tokenizer":
        assert (run / "tokenizer/tokenizer.json").is_file()
        return
    if name == "precompute":
        assert list((house.root / "runs" / family / "latents/latents").glob("*.tar"))
        return
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert any(key.startswith("heldout_") for key in lines[-1])
    assert any((run / "tensorboard").iterdir())
    weights = {"vae": "vae", "upscaler": "vae", "text_encoder": "text_encoder"}.get(name, "transformer")
    assert (run / weights / "config.json").is_file() and (run / f"{weights}.safetensors").is_file()
    if name in ("vae", "upscaler", "denoiser", "unet"):
        assert (run / "samples/0000002.png").is_file()
    if name in ("vae", "upscaler", "text_encoder"):
        assert json.loads((run / "report.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    "config",
    [c for c in ALL if CONFIGS[c.split("/")[1]][0] in ("vae", "upscaler", "text_encoder", "denoiser")],
)
def test_a_run_goes_on(house, config, tmp_path):
    recipe, _, overrides = CONFIGS[config.split("/")[1]]
    house.made(config)
    out = tmp_path / "run"
    args = [f"configs/{config}.yaml", *overrides, f"trainer.output_dir={out}", "trainer.decay_fraction=0"]
    house.run(recipe, *args)
    assert "resumed at step 2" in house.run(recipe, *args, "trainer.steps=3")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["denoiser", "unet"])
def test_a_denoiser_run_leaves_a_pipeline(house, name):
    from diffusionfm.pipeline import DiffusionFMPipeline

    house.made(f"tiny/{name}")
    pipe = DiffusionFMPipeline.from_pretrained(house.root / "runs/tiny" / name / "pipeline")
    assert pipe.defaults["height"] == pipe.defaults["width"] == 32
    picture = pipe("a red heart", num_inference_steps=1).images[0]
    assert picture.size == (32, 32) and picture.mode == "RGBA"


def test_a_finished_model_gets_its_few_steps(house):
    from diffusionfm.pipeline import DiffusionFMPipeline

    house.made("tiny/denoiser")
    model, paths, run = (f"runs/{name}" for name in ("tiny/denoiser/pipeline", "paths", "few"))
    options = (f"model={model}", f"output_dir={paths}", "count=4", "batch_size=4")
    house.run("paths", "configs/icons/paths.yaml", *options)
    short = ("trainer.steps=2", "trainer.batch_size=2", "trainer.compile=false", "rank=1", "held_out=1")
    options = (f"model={model}", f"paths=[{paths}]", f"trainer.output_dir={run}", *short)
    house.run("distill", "configs/icons/distill.yaml", *options)
    whole = shutil.copytree(house.root / model, house.root / "runs/whole")
    shutil.copytree(house.root / run / "few_step", whole / "few_step")
    fast = DiffusionFMPipeline.from_pretrained(whole, fast=True)
    assert fast.defaults["steps"] == 3 and fast("a red heart").images[0].size == (32, 32)


def test_a_model_is_taught_other_words_and_nothing_else(house):
    from safetensors.torch import load_file

    from diffusionfm.data.reader import ShardDataset
    from diffusionfm.phrasing import article
    from diffusionfm.pipeline import DiffusionFMPipeline

    house.made("tiny/denoiser")
    model, run = (house.root / "runs" / name for name in ("tiny/denoiser/pipeline", "words"))
    run.mkdir()
    phrase = ShardDataset(house.root / "runs/tiny/latents/latents", needs=("safetensors", "txt")).meta(0)[
        "phrase"
    ]
    rows = ShardDataset(house.root / "runs/tiny/latents/latents", needs=("safetensors", "txt"), split="train")
    phrases = sorted({row for (row,) in rows.columns("phrase")})
    pairs = [[f"thing {k}", article(phrase)] for k in range(60)]
    (run / "other_words.json").write_text(json.dumps({"least": 0.5, "phrases": phrases, "pairs": pairs}))
    short = ("trainer.steps=2", "trainer.batch_size=4", "pictures=4", "sources=1", "kept_back=0.2")
    places = (f"model={model}", "shards=runs/tiny/latents/latents", f"trainer.output_dir={run}")
    assert "60 texts" in house.run("paraphrase", "configs/icons/paraphrase.yaml", *short, *places)
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= metrics["understood_top1"] <= metrics["understood_top5"] <= 1
    taught = DiffusionFMPipeline.from_pretrained(run / "pipeline")
    assert taught("a red heart", num_inference_steps=1).images[0].size == (32, 32)
    for name in ("transformer", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (run / "pipeline" / file).read_bytes() == (model / file).read_bytes()
    before, after = (load_file(f / "text_encoder/model.safetensors") for f in (model, run / "pipeline"))
    assert any((value != after[name]).any() for name, value in before.items())


def test_the_vae_knows_its_latents(house):
    import torch

    from diffusionfm.autoencoder import AutoencoderKL

    house.made("tiny/vae")
    vae = AutoencoderKL.from_pretrained(house.root / "runs/tiny/vae/vae")
    assert bool((vae.latent_std != 1).all()) and bool(torch.isfinite(vae.latent_mean).all())


def test_latents_keep_words_and_are_made_once(house):
    from diffusionfm.data.reader import ShardDataset

    house.made("tiny/precompute")
    pictures = ShardDataset(house.root / "runs/tiny/shards")
    latents = ShardDataset(house.root / "runs/tiny/latents/latents", needs=("safetensors", "txt"))
    assert len(latents) == len(pictures)
    for i in (0, len(latents) - 1):
        kept = {k: v for k, v in latents.meta(i).items() if k not in ("vae", "sha256")}
        assert kept == {k: v for k, v in pictures.meta(i).items() if k != "sha256"}
    assert "is complete" in house.run("precompute", "configs/tiny/precompute.yaml")


def test_the_tokenizer_is_the_same_each_time(house, tmp_path):
    for name in ("a", "b"):
        house.run("tokenizer", "configs/tiny/tokenizer.yaml", f"trainer.output_dir={tmp_path / name}")
    first, second = ((tmp_path / name / "tokenizer/tokenizer.json").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.fixture
def refuses(house, capsys):
    """Run a recipe that must fail: exit code 2 and one line on standard error, which is returned."""

    def run(recipe: str, *args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            house.run(recipe, *args)
        error = capsys.readouterr().err
        assert left.value.code == 2
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0]) and "Traceback" not in error
        return lines[0]

    return run


@pytest.mark.parametrize("recipe", ["tokenizer", "vae", "upscaler", "text_encoder", "precompute", "denoiser"])
def test_an_unknown_key_and_a_wrong_type(refuses, recipe):
    config = f"configs/tiny/{recipe}.yaml"
    assert "trainer.steps" in refuses(recipe, config, "trainer.stepz=3")
    assert "trainer.steps" in refuses(recipe, config, "trainer.steps=many")


@pytest.mark.parametrize(
    ("recipe", "key"),
    [("tokenizer", "shards"), ("vae", "data.shards"), ("precompute", "shards"), ("denoiser", "data.shards")],
)
def test_missing_shards(house, refuses, recipe, key):
    if recipe in ("denoiser", "precompute"):
        house.made("tiny/denoiser")
    assert "nowhere is not a folder" in refuses(recipe, f"configs/tiny/{recipe}.yaml", f"{key}=nowhere")


@pytest.mark.parametrize(
    ("config", "key"),
    [("text_encoder", "tokenizer"), ("precompute", "vae"), ("denoiser", "vae"), ("denoiser", "text_encoder")],
)
def test_a_missing_network(house, refuses, config, key):
    house.made("tiny/denoiser")
    assert f"{key}=nowhere" in refuses(config, f"configs/tiny/{config}.yaml", f"{key}=nowhere")


def test_latents_of_another_autoencoder(house, refuses, tmp_path):
    from diffusionfm.autoencoder import AutoencoderKL

    house.made("tiny/denoiser")
    AutoencoderKL(8, (24, 64, 96), (1, 1), (1, 1, 1)).save_pretrained(tmp_path / "vae")
    said = refuses(
        "denoiser", "configs/tiny/denoiser.yaml", f"vae={tmp_path / 'vae'}", "trainer.output_dir=runs/other"
    )
    assert "another autoencoder" in said and "precompute" in said


def test_wrong_kind_and_a_vae_that_never_measures(house, refuses):
    house.made("tiny/denoiser")
    assert "unet" in refuses("denoiser", "configs/tiny/denoiser.yaml", "kind=gan")
    assert "validate_every" in refuses("vae", "configs/tiny/vae.yaml", "trainer.validate_every=0")


@pytest.mark.parametrize(
    ("recipe", "override", "near"),
    [
        ("vae", "vae.latent_chanels=4", "vae.latent_channels"),
        ("vae", "objective.backgrund=1", "objective.background"),
        ("upscaler", "objective.crp=1", "objective.crop"),
        ("text_encoder", "image_tower.dimm=8", "image_tower.dim"),
        ("text_encoder", "objective.distil=1", "objective.distill"),
        ("denoiser", "denoiser.widht=8", "denoiser.width"),
        ("denoiser", "objective.tune_txt=1", "objective.tune_text"),
        ("denoiser", "objective.times.shfit=2", "objective.times.shift"),
    ],
)
def test_what_goes_to_a_network_or_an_objective_is_checked_by_name(house, refuses, recipe, override, near):
    house.made("tiny/denoiser")
    house.made("tiny/upscaler")
    said = refuses(recipe, f"configs/tiny/{recipe}.yaml", override)
    assert f"unknown key {override.partition('=')[0]!r}" in said and f"did you mean {near}" in said


def test_what_a_denoiser_run_could_not_draw_is_told_before_it_trains(house, refuses):
    house.made("tiny/denoiser")
    cases = {"sample.steps=0": "steps must be", "sample.prompts=[]": "prompts is empty"}
    for override, word in cases.items():
        args = ["configs/tiny/denoiser.yaml", override, "trainer.output_dir=runs/undrawn"]
        assert word in refuses("denoiser", *args)
    assert not (house.root / "runs/undrawn/metrics.jsonl").exists()


@pytest.mark.slow
def test_the_whole_way_from_a_folder_of_ones_own(tmp_path):
    """As the README says: pack the pictures, then one command makes latents and trains on from the shipped weights."""
    from diffusionfm.cli import main

    for name in ("train", "configs", "diffusionfm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-pictures").mkdir()
    for key, picture, caption, _ in shape_samples(12, 128, seed=0):
        picture.save(tmp_path / f"my-pictures/{key}.png")
        (tmp_path / f"my-pictures/{key}.txt").write_text(caption)
    assert main(["shards", "pack", str(tmp_path / "my-pictures"), "--out", str(tmp_path / "data/own")]) == 0
    command = [sys.executable, "train/denoiser.py", "configs/own/denoiser.yaml", *DENOISER]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warm start from diffusionfm/weights/icons" in done.stdout
    last = (tmp_path / "runs/own/denoiser/metrics.jsonl").read_text().splitlines()[-1]
    assert 0 < json.loads(last)["heldout_loss"] < 1
    assert (tmp_path / "runs/own/denoiser/pipeline/model_index.json").is_file()


@pytest.mark.slow
def test_the_whole_way_from_nothing(tmp_path):
    """One command makes all a tiny denoiser needs, trains it, and its pictures have the colours asked for."""
    import numpy as np

    from diffusionfm.colors import rgb
    from diffusionfm.pipeline import DiffusionFMPipeline

    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "train/denoiser.py", "configs/tiny/denoiser.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = DiffusionFMPipeline.from_pretrained(tmp_path / "runs/tiny/denoiser/pipeline")
    for word in ("red", "blue", "green"):
        near = []
        for picture in pipe(f"a {word} circle", num_images=4).images:
            pixels = np.asarray(picture, dtype=float)
            solid = pixels[pixels[..., 3] > 200][:, :3]
            near.append(len(solid) > 30 and float(np.abs(np.median(solid, 0) - rgb(word)).max()) < 60)
        assert sum(near) >= 3, word
