"""Weights and state cut over ranks: one process's numbers, checkpoints for any ranks, Muon shared out."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionfm import checkpoint, ema
from diffusionfm.trainer import TrainerConfig

TOY = Path(__file__).parent / "trainer_toy.py"
COMMON = {
    "trainer.batch_size": 8,
    "trainer.lr": 0.01,
    "trainer.warmup": 2,
    "trainer.decay_fraction": 0.0,
    "trainer.tracker": "none",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.ema": "[0.05,0.1]",
    "net": "transformer",
}


def _command(ranks: int, run: Path, launch: tuple[str, ...] = ("--standalone",), **keys) -> list[str]:
    settings = [f"{key}={value}" for key, value in (COMMON | {"trainer.output_dir": run} | keys).items()]
    many = ["-m", "torch.distributed.run", *launch, "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *many, str(TOY), *settings]


def _run(*command: list[str]) -> str:
    """Start the commands at once and wait for them all; what they said."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        for c in command
    ]
    ended = [child.communicate(timeout=600) for child in children]
    for child, (_, error) in zip(children, ended, strict=True):
        assert child.returncode == 0, error[-3000:]
    return "".join(out for out, _ in ended)


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [value for line in lines for value in (line["loss"], line["grad_norm"])]


def _close(a: Path, b: Path, step: int) -> None:
    """Checkpoints and exports of two runs hold the same numbers, but for the order of sums.

    Adam and Newton-Schulz blow rounding up where a gradient is next to nothing, so what is compared is the distance
    over all tensors of a file.
    """
    one, two = (checkpoint.load(checkpoint.step_folder(run, step))[0] for run in (a, b))
    assert one.keys() == two.keys() == {"net", "gain", "ema", "ema_1", "optimizer"}
    one["export"], two["export"] = (load_file(run / "net.safetensors") for run in (a, b))
    for name in one:
        assert {key: v.shape for key, v in one[name].items()} == {
            key: v.shape for key, v in two[name].items()
        }
        flat = [torch.cat([group[name][key].double().flatten() for key in one[name]]) for group in (one, two)]
        assert float((flat[1] - flat[0]).norm() / flat[0].norm()) < 5e-3, name


def test_shares_of_ranks_are_joined(tmp_path):
    whole = {"w": torch.arange(10.0).view(5, 2), "b": torch.arange(1.0), "n": torch.tensor(3)}
    folder = checkpoint.step_folder(tmp_path, 1)
    aside = checkpoint.begin(folder)
    files = {}
    for rank, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        share = {"w": whole["w"][rows], "b": whole["b"][rows]} | ({"n": whole["n"]} if rank == 0 else {})
        files |= checkpoint.write_files(aside, {checkpoint.shard_name("net", rank, 3): share})
    assert checkpoint.latest(tmp_path) is None
    checkpoint.finish(folder, files, {"step": 1})
    tensors, state = checkpoint.load(folder)
    assert state["step"] == 1 and all(torch.equal(tensors["net"][key], whole[key]) for key in whole)
    (folder / checkpoint.shard_name("net", 1, 3)).unlink()
    assert "net.00001-of-00003.safetensors is missing" in str(checkpoint.find_fault(folder))


def test_the_batch_divides_into_ranks_and_pieces():
    assert TrainerConfig(batch_size=24, grad_accum=2).pieces(4) == 3
    with pytest.raises(ValueError, match=r"batch_size=24 does not divide into 5 processes.*multiple of 10"):
        TrainerConfig(batch_size=24, grad_accum=2).pieces(5)
    with pytest.raises(ValueError, match="trainer.sharding must be one of none, fsdp, hsdp"):
        TrainerConfig(sharding="zero")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_go_on_as_four_and_as_one(tmp_path, optimizer):
    """Sharded over 2, then over 4, then whole on 1: the trace, state and averages of one process all the way."""
    keys = {"trainer.optimizer": optimizer, "trainer.checkpoint_every": 2}
    cut, plain = tmp_path / "cut", tmp_path / "plain"
    _run(_command(1, plain, **keys, **{"trainer.steps": 6}))
    said = ""
    for ranks, steps, sharding in ((2, 2, "fsdp"), (4, 4, "fsdp"), (1, 6, "none")):
        more = {"trainer.steps": steps, "trainer.sharding": sharding}
        said += _run(_command(ranks, cut, **keys, **more))
        names = [path.name for path in checkpoint.step_folder(cut, steps).glob("net.*")]
        assert len(names) == ranks
    assert re.findall(r"resumed at step (\d+)", said) == ["2", "4"]
    assert _losses(cut) == pytest.approx(_losses(plain), rel=1e-3)
    _close(plain, cut, 6)
    assert json.loads((cut / "net" / "config.json").read_text())["_class_name"] == "DiffusionTransformer"
    assert {w: list(kept) for w, kept in ema.snapshots(cut).items()} == {0.05: [2, 4, 6], 0.1: [2, 4, 6]}


@pytest.mark.slow
def test_two_machines_keep_a_copy_each(tmp_path):
    """HSDP: two launchers of two ranks each, as two machines would start them; a U-Net this time."""
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    keys = {"net": "unet", "trainer.steps": 3}
    _run(_command(1, plain, **keys))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        ("--nnodes", "2", "--node_rank", str(k), "--master_addr", "127.0.0.1", "--master_port", str(port))
        for k in range(2)
    ]
    _run(*(_command(2, cut, machine, **keys, **{"trainer.sharding": "hsdp"}) for machine in machines))
    assert len(list(checkpoint.step_folder(cut, 3).glob("net.*"))) == 2
    assert _losses(cut) == pytest.approx(_losses(plain), rel=1e-3)
    _close(plain, cut, 3)


SHARED_OUT = """
import math
import torch, torch.distributed as dist
from diffusionfm.cost import count_flops
from diffusionfm.muon import Muon, orthogonal
from diffusionfm.devices import has_fast_bf16

dist.init_process_group("gloo")
draw = torch.Generator().manual_seed(0)
dtype = torch.bfloat16 if has_fast_bf16(torch.device("cpu")) else torch.float32
shapes = [(8, 16), (16, 8), (12, 12), (4, 4), (12, 6)]
ours = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
alone = [p.detach().clone() for p in ours]
momentum = [torch.zeros_like(p) for p in alone]
muon, flops = Muon(ours, 0.01, 0.1), []
for step in range(4):
    for i, p in enumerate(ours):
        p.grad = None if (step, i) == (2, 3) else torch.randn(p.shape, generator=draw)
        if p.grad is not None:
            update = p.grad.lerp(momentum[i].lerp_(p.grad, 1 - 0.95), 0.95)
            alone[i].mul_(1 - 0.01 * 0.1)
            alone[i].add_(orthogonal(update.to(dtype)), alpha=-0.01 * (0.2 * math.sqrt(max(p.shape))))
    flops.append(count_flops(muon.step))
assert all(torch.equal(p, q) for p, q in zip(ours, alone))
assert all(torch.equal(muon.state[p]["momentum_buffer"], m) for p, m in zip(ours, momentum))
counts = [torch.zeros(1) for _ in range(dist.get_world_size())]
dist.all_gather(counts, torch.tensor([sum(flops)]))
assert 0 < max(counts) < 0.9 * sum(counts), counts
print("shared out")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_muon_shared_out_over_ranks_is_muon_bit_for_bit(tmp_path):
    script = tmp_path / "shared_out.py"
    script.write_text(SHARED_OUT)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    assert _run(launch).count("shared out") == 2
