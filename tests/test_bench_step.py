"""The step and memory benchmarks run as their README line says, and count what they claim to count."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmarks.common import Products, Shape, flops, products_of, seconds_alone
from torch import nn
from torch.nn import functional as F

from diffusionfm.cost import count_flops

FOLDER = Path(__file__).parent / "benchmarks"


def run(tmp_path, script, *more):
    """The rows a benchmark writes."""
    out = tmp_path / "rows.json"
    command = [sys.executable, FOLDER / script, "--device", "cpu", "--json", out, *more]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert {"date", "machine", "threads", "torch", "commit"} <= set(written["machine"])
    return written["rows"], done.stdout


def test_products_are_those_of_forward_and_backward():
    linear = nn.Linear(6, 10)

    def call():
        x = torch.ones(4, 6, requires_grad=True)
        q = linear(x).view(1, 2, 4, 5)
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    with Products() as counted:
        call()
    # linear: y = x W, dx, dW; attention: q k, p v and two gradients of each; 2 operations a multiply-add
    assert flops(counted.found) == 2 * (3 * 4 * 6 * 10 + 6 * 2 * 4 * 4 * 5)
    assert seconds_alone(counted.found, "cpu", torch.float32, rounds=1) > 0


def test_products_on_the_meta_device_are_those_that_run():
    def build(device):
        layer = nn.Linear(8, 8, device=device)
        return lambda: layer(torch.ones(3, 8, device=device)).sum().backward()

    with Products() as counted:
        build("cpu")()
    assert products_of(build) == counted.found != Counter()
    assert flops(counted.found) == count_flops(build("cpu"))


def test_tokens_must_be_a_square():
    assert Shape(tokens=64).side == 16
    with pytest.raises(SystemExit, match="squares"):
        _ = Shape(tokens=60).side


@pytest.mark.slow
def test_the_step_benchmark_prints_a_row_a_network(tmp_path):
    rows, printed = run(
        tmp_path,
        "train_step.py",
        "--sizes",
        "tiny",
        "--tokens",
        "16",
        "--text",
        "3",
        "--batch",
        "2",
        "--rounds",
        "1",
    )
    names = [row["network"] for row in rows]
    assert names == ["ours (auto)", "ours, params as PixArt", "PixArt", "SD3"]
    assert all(row["ms"] > 0 and row["GFLOP"] > 0 for row in rows)
    size = {row["network"]: row["params M"] for row in rows}
    assert math.isclose(size["ours, params as PixArt"], size["PixArt"], rel_tol=0.05)
    assert max(row["against the faster peer"] for row in rows if row["network"] in ("PixArt", "SD3")) == 1
    assert printed.count("\n| tiny") == 4


@pytest.mark.slow
def test_the_memory_benchmark_shows_linear_and_quadratic(tmp_path):
    rows, _ = run(
        tmp_path,
        "memory.py",
        "--sizes",
        "tiny",
        "--tokens",
        "576",
        "2304",
        "--text",
        "4",
        "--batches",
        "1",
        "--dtype",
        "fp32",
    )
    growth = {(row["what"], row["kernel"]): row["growth"] for row in rows if row["growth"]}
    assert growth["attention", "sdpa"] < 4.5 and growth["attention", "flash"] < 4.5
    assert growth["attention", "matmul"] > 8
    peak = {(row["what"], row["kernel"], row["tokens"]): row["peak MiB"] for row in rows}
    assert peak["step, checkpointing", "sdpa", 2304] < peak["step", "sdpa", 2304] / 2
