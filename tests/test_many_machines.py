"""Every recipe from its own YAML on two and four gloo processes, by `accelerate launch` and by torchrun."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionfm.data.shapes import build_shapes

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["trainer.steps=2", "trainer.batch_size=8", "trainer.precision=fp32"]
VAE = [*SHORT, "validation_pictures=4", "statistics_pictures=8"]
TEXT = [*SHORT, "candidates=4"]
DENOISER = [*SHORT, "sample.steps=1", "sample.prompts=[a red heart]", "validation_latents=4"]
# `accelerate launch --cpu` starts one process whatever --num_processes says; --multi_gpu starts ranks, GPUs or not.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--main_process_port=0", "--num_processes"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder like the repository's root where one process has run every tiny recipe for two steps."""
    root = tmp_path_factory.mktemp("house")
    for name in ("train", "configs"):
        (root / name).symlink_to(ROOT / name)
    build_shapes(root / "runs/tiny/shards", count=60)
    here = Path.cwd()
    os.chdir(root)
    try:
        for recipe, overrides in {
            "tokenizer": [],
            "vae": VAE,
            "text_encoder": TEXT,
            "precompute": [],
        }.items():
            importlib.import_module(f"train.{recipe}").main([f"configs/tiny/{recipe}.yaml", *overrides])
    finally:
        os.chdir(here)
    return root


def launch(house: Path, how: list[str], ranks: int, recipe: str, *overrides: str, code: int = 0) -> str:
    """What a recipe on so many ranks printed."""
    command = [
        sys.executable,
        *how,
        str(ranks),
        f"train/{recipe}.py",
        f"configs/tiny/{recipe}.yaml",
        *overrides,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=house, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_autoencoder_by_accelerate_launch(house, tmp_path):
    launch(house, ACCELERATE, 2, "vae", *VAE, f"trainer.output_dir={tmp_path}")
    lines = metrics(tmp_path)
    assert [(line["step"], line["samples"]) for line in lines] == [(1, 8), (2, 16)]
    alone = load_file(house / "runs/tiny/vae/vae.safetensors")
    shared = load_file(tmp_path / "vae.safetensors")
    assert alone.keys() == shared.keys() and "heldout_psnr_white" in lines[-1]


def test_the_text_encoder_learns_the_same_on_two_ranks(house, tmp_path):
    """Contrast reaches across ranks: eight captions against eight pictures, however they are dealt out."""
    said = launch(house, TORCHRUN, 2, "text_encoder", *TEXT, f"trainer.output_dir={tmp_path}")
    assert "FutureWarning" not in said
    for one, two in zip(metrics(house / "runs/tiny/text_encoder"), metrics(tmp_path), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_the_denoiser_on_four_ranks_goes_on_alone(house, tmp_path):
    from diffusionfm.pipeline import DiffusionFMPipeline

    settings = [*DENOISER, f"trainer.output_dir={tmp_path}", "trainer.decay_fraction=0"]
    launch(house, TORCHRUN, 4, "denoiser", *settings)
    assert [line["samples"] for line in metrics(tmp_path)] == [8, 16]
    assert DiffusionFMPipeline.from_pretrained(tmp_path / "pipeline").defaults["height"] == 32
    said = launch(house, TORCHRUN, 1, "denoiser", *settings, "trainer.steps=3")
    assert "resumed at step 2" in said and [line["samples"] for line in metrics(tmp_path)] == [8, 16, 24]


def test_precompute_by_accelerate_launch(house, tmp_path):
    launch(house, ACCELERATE, 2, "precompute", f"trainer.output_dir={tmp_path}")
    alone = {path.name: path.read_bytes() for path in (house / "runs/tiny/latents/latents").iterdir()}
    assert alone == {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()}


def test_ranks_that_do_not_divide_the_batch_are_told(house, tmp_path):
    said = launch(house, TORCHRUN, 3, "vae", *VAE, f"trainer.output_dir={tmp_path}", code=1)
    assert "trainer.batch_size=8 does not divide into 3 processes" in said


# ---- the gradient of the gathered contrast -----------------------------------------------------------------------

RANK_SCRIPT = """
import sys

import torch
from safetensors.torch import save_file

from diffusionfm.ranks import gather
from test_many_machines import contrast_gradients

torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
mine = torch.arange(8).chunk(world)[rank]
assert torch.equal(gather(mine), torch.arange(8)) and torch.equal(gather(mine.float()), torch.arange(8.0))
gradients = contrast_gradients(sys.argv[1], rank, world)
for value in gradients.values():
    torch.distributed.all_reduce(value)
    value /= world
if rank == 0:
    save_file(gradients, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def contrast_gradients(model: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of the contrastive loss on this rank's part of twelve captioned pictures, by parameter."""
    from diffusionfm.encoders import load_text
    from diffusionfm.objectives import Contrastive
    from diffusionfm.text import ImageTower

    text_encoder, tokenizer = load_text(f"{model}/text_encoder", f"{model}/tokenizer")
    torch.manual_seed(0)
    tower = ImageTower(dim=8, widths=(8, 16), depths=(1, 1))
    objective = Contrastive(text_encoder.requires_grad_(True), tokenizer, tower, dim=8)
    phrases = ["apple", "fish", "star", "house", "fish", "cat"] * 2
    pictures = torch.rand(12, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    batch = {
        "picture": pictures[mine],
        "caption": [f"a {k} {phrase}" for k, phrase in enumerate(phrases)][mine],
        "phrase": phrases[mine],
    }
    loss, _ = objective(batch)
    loss.backward()
    found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()[None]}


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradient_of_the_gathered_contrast_is_that_of_the_joined_batch(tiny_model, tmp_path, world):
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    command = [sys.executable, *TORCHRUN, str(world)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(tiny_model), str(tmp_path / "gradients.safetensors")],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr[-4000:]
    joined, shared = contrast_gradients(str(tiny_model)), load_file(tmp_path / "gradients.safetensors")
    assert joined.keys() == shared.keys() and float(joined["heads.scale.log"]) != 0
    for name, value in joined.items():
        torch.testing.assert_close(shared[name], value, atol=1e-6, rtol=1e-4)
