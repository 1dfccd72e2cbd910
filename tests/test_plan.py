"""`diffusionfm plan`: counts that agree with the real thing, memory that a real run needs, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusionfm import cost, gpus
from diffusionfm.cli import main
from diffusionfm.config import load_config
from diffusionfm.plan import (
    Shapes,
    build,
    launch_line,
    loss_of,
    measure_cpu,
    memory_of,
    predict,
    seconds_of,
    table,
)
from diffusionfm.trace import Step, Trace, trace_step
from tests.benchmarks import plan_memory
from train.denoiser import DenoiserConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/tiny/denoiser.yaml"


def tiny(*overrides: str) -> DenoiserConfig:
    cfg = load_config(DenoiserConfig, TINY, list(overrides))
    cfg.denoiser |= {"in_channels": 8, "text_dim": 64}
    return cfg


@pytest.fixture(scope="module")
def step() -> Step:
    """One traced step of the tiny denoiser."""
    cfg = tiny()
    shapes = Shapes(64, 64, 8, 4, 16, 64, 32)
    return trace_step(
        lambda: build(cfg, shapes, "sdpa"),
        lambda network: loss_of(network, shapes),
        cfg.trainer,
        bf16=True,
        gpu=True,
    )


# ---- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT, AdamW, fp32", "U-Net, AdamW"])
def test_predicted_memory_is_within_15_percent_of_a_real_run(name, tmp_path):
    found = plan_memory.compare(plan_memory.CASES[name], tmp_path, steps=2)
    assert found["measured"] > 20 * 2**20
    assert 0.85 < found["ratio"] < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_memory.CASES)
def test_predicted_memory_of_every_case(name, tmp_path):
    assert 0.85 < plan_memory.compare(plan_memory.CASES[name], tmp_path)["ratio"] < 1.15


def test_state_is_what_the_optimisers_keep(step):
    cfg = tiny()
    network = build(cfg, Shapes(64, 64, 8, 4, 16, 64, 32), "sdpa")
    count = sum(p.numel() for p in network.parameters())
    assert step.parameters == count and step.weights == step.gradients == step.averages == 4 * count
    steps_taken = 4 * len(list(network.parameters()))
    assert 8 * count <= step.optimizer <= 8 * count + 64 * steps_taken  # AdamW: two moments and a step each


def test_flops_are_those_torch_counts(step):
    cfg, shapes = tiny(), Shapes(64, 64, 8, 4, 16, 64, 32)
    network = build(cfg, shapes, "matmul").train()
    counted = cost.count_flops(lambda: loss_of(network, shapes).backward())
    assert step.flops == pytest.approx(
        counted, rel=0.05
    )  # attention's own backward computes its scores again


def test_a_trace_counts_what_lives_and_forgets_what_is_freed():
    with Trace() as trace:
        a = torch.zeros(1000)
        b = a[10:].view(-1)  # no new storage
        c = a + 1
        del a, b, c
    assert trace.peak == 8000 and trace.live == 0
    assert [moved for _, moved in trace.work] == [4000.0, 8000.0]


def test_checkpointing_and_routing_save_memory(step):
    shapes = Shapes(64, 64, 8, 4, 16, 64, 32)

    def activations(*overrides: str, route: dict | None = None) -> int:
        cfg = tiny(*overrides)
        cfg.denoiser |= {"depth": 4, "route": route}
        args = lambda: build(cfg, shapes, "sdpa"), lambda network: loss_of(network, shapes), cfg.trainer
        return trace_step(*args, bf16=True, gpu=True).activations

    plain = activations()
    assert activations("checkpointing=true") < 0.6 * plain
    assert activations(route={"share": 0.5, "start": 1, "end": -1}) < 0.9 * plain


# ---- predictions -----------------------------------------------------------------------------------------


def test_sharding_shares_out_state_and_keeps_activations(step):
    def memory(count: int, **settings: object) -> dict[str, float]:
        trainer = tiny(*(f"trainer.{key}={value}" for key, value in settings.items())).trainer
        return memory_of(step, trainer, count, 100.0, on_gpu=False)

    one, ddp, fsdp, hsdp = memory(1), memory(16), memory(16, sharding="fsdp"), memory(16, sharding="hsdp")
    for name in ("weights", "optimizer", "averages", "gradients"):
        assert one[name] == ddp[name] == 16 * fsdp[name] == 8 * hsdp[name]
    assert ddp["DDP buckets"] == step.gradients and "DDP buckets" not in fsdp
    assert fsdp["gathered blocks"] == 2 * step.largest_block > 0
    assert fsdp["frozen encoders"] == one["frozen encoders"] == 100
    assert one["gradients"] + one["activations"] == max(step.peak, step.gradients + step.update)
    pieces = memory(1, grad_accum=2)
    assert pieces["gradients"] == step.gradients and pieces["activations"] >= step.activations
    for found in (one, ddp, fsdp, hsdp, pieces):
        assert found["total"] == pytest.approx(sum(v for k, v in found.items() if k != "total"))


def test_time_is_a_roofline(step):
    trainer, gpu = tiny().trainer, gpus.GPUS["h100"]
    step = Step(passes=[(1e12, 1.0), (0.0, 1e9), (0.0, 1.0)], weights=8 * 10**9, gradients=8 * 10**9)
    expected = 1e12 / (0.7 * 989e12) + 1e9 / (0.8 * 3.35e12) + gpus.LAUNCH
    seconds = seconds_of(step, trainer, 1, gpu, bf16=True)
    assert seconds["forward and backward"] == pytest.approx(expected) and seconds["talk"] == 0
    near, far = (seconds_of(step, trainer, count, gpu, bf16=True)["talk"] for count in (8, 64))
    assert 0 < near < far
    trainer.compile = True
    fused = seconds_of(step, trainer, 1, gpu, bf16=True)["forward and backward"]
    assert fused < expected


def test_a_bigger_machine_is_faster_and_costs_add_up():
    plans = {name: predict(tiny(), 1, name) for name in ("a100-80", "b200")}
    small, big = plans["a100-80"], plans["b200"]
    assert big.images_per_s >= small.images_per_s and small.fits
    hours = small.steps * sum(small.seconds.values()) / 3600
    assert small.gpu_hours == pytest.approx(hours)
    assert small.kwh == pytest.approx(hours * 400 * gpus.OVERHEAD / 1000)
    assert small.images_per_s == pytest.approx(64 / sum(small.seconds.values()))
    words = table(small, "x.yaml")
    assert "312.00 TFLOP/s peak" in words and "70% of matrix" in words and "400 W" in words


def test_a_plan_that_does_not_fit_says_so():
    plan = predict(tiny(), 1, "rtx-4090")
    plan.memory["total"] = 1e15
    assert not plan.fits and "DOES NOT FIT" in table(plan, "x")


def test_buckets_decide_the_shape_and_the_pictures_of_a_step():
    cfg = load_config(
        DenoiserConfig,
        ROOT / "configs/photo/denoiser-512.yaml",
        ["denoiser.width=64", "denoiser.depth=2", "denoiser.heads=2"],
    )
    plan = predict(cfg, 64, "h100")
    assert (plan.shapes.tokens, plan.shapes.side, plan.shapes.pictures, plan.shapes.micro) == (
        1024,
        64,
        512,
        8,
    )
    assert plan.shapes.text_tokens == 128
    assert launch_line("c.yaml", plan).startswith("torchrun --nnodes 8 --nproc-per-node 8 ")
    batched = predict(
        cfg, 64, "h100", batch=256
    )  # the tokens of a step hold twice as many, and it trains on all
    assert batched.shapes.pictures == 512
    with pytest.raises(ValueError, match="does not hold 1024 pictures"):
        predict(cfg, 64, "h100", batch=1024)


def test_processes_share_a_cpu():
    alone, shared = (measure_cpu(False, count, seconds=0.02) for count in (1, 2))
    assert shared.memory == alone.memory / 2 and shared.watts == alone.watts / 2
    cfg = load_config(DenoiserConfig, TINY, ["objective.tune_text=true"])
    plan = predict(cfg, 2, "cpu")
    line = launch_line("c.yaml", plan)
    assert (
        line.startswith("OMP_NUM_THREADS=")
        and " torchrun --standalone --nproc_per_node 2 train/denoiser.py" in line
    )
    assert any("the text encoder learns along" in note for note in plan.notes)


@pytest.mark.slow
@pytest.mark.parametrize("side", [256, 512, 1024])
def test_the_photo_run_fits_on_the_gpus_it_was_made_for(side):
    cfg = load_config(DenoiserConfig, ROOT / f"configs/photo/denoiser-{side}.yaml")
    plan = predict(cfg, 64, "h100")
    assert plan.fits and 0.33e9 < plan.parameters < 0.37e9 and 0.2 < plan.utilisation < 0.7
    assert plan.steps * plan.shapes.pictures > 5e6


# ---- the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["tiny/denoiser", "tiny/unet", "icons/denoiser"])
def test_the_command_on_shipped_configs(config, capsys):
    path = str(ROOT / f"configs/{config}.yaml")
    assert main(["plan", path, "trainer.steps=10", "trainer.precision=fp32", "--gpu", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "M parameters" in said and "activations" in said and "GPU-hours" in said
    assert said.rstrip().endswith(
        f"start it     python train/denoiser.py {path} trainer.steps=10 trainer.precision=fp32"
    )


def test_json_and_the_batch(capsys):
    assert main(["plan", str(TINY), "--gpus", "8", "--gpu", "H100", "--batch", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["shapes"]["micro"] == 16 and found["gpu"] == "h100"
    assert found["launch"].startswith("accelerate launch --multi_gpu --num_processes 8 train/denoiser.py")
    assert found["launch"].endswith("trainer.batch_size=128")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CONFIG", "--gpu", "h900"], "h200"),
        (["CONFIG", "--gpus", "0"], "--gpus is 1 to 8"),
        (["CONFIG", "--gpus", "12"], "multiple of it, not 12"),
        (["CONFIG", "--gpus", "8", "--batch", "100"], "take a multiple of 8"),
        (["CONFIG", "--batch", "0"], "--batch is 1 or more"),
        (["nowhere.yaml"], "no such config: nowhere.yaml"),
        (["configs/tiny/vae.yaml"], "plan reads configs of train/denoiser.py"),
        (["CONFIG", "trainer.stepz=1"], "trainer.steps"),
        (["CONFIG", "kind=gan"], "unet"),
        (["CONFIG", "denoiser.wide=3"], "wide"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = main(["plan", *[str(TINY) if word == "CONFIG" else word for word in words]])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err


def test_an_unknown_gpu_is_told_before_torch_is_loaded():
    code = "import sys; from diffusionfm.cli import main; main(['plan', 'x', '--gpu', 'y'])\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and "a100-40" in done.stderr
