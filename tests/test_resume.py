"""Runs that are killed, run out of disk, or go on with other ranks or other data: real processes over real shards."""

import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusionfm import checkpoint
from diffusionfm.data.shards import ShardWriter

sys.path.insert(0, str(Path(__file__).parent))
from resume_toy import forked  # noqa: E402

COMMON = {"batch_size": 4, "warmup": 2, "lr": 0.01, "device": "cpu", "precision": "fp32", "tracker": "none"}
WAIT = 300  # seconds until a process that makes no headway counts as hung


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything: each is there in a moment, each can be killed."""
    context = multiprocessing.get_context("forkserver")
    names = ("data.training", "trainer", "transformer", "unet")
    context.set_forkserver_preload([f"diffusionfm.{name}" for name in names])  # all that resume_toy imports
    return context


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("resume") / "shards", 22)


def write(folder: Path, count: int, first: int = 0) -> Path:
    with ShardWriter(folder, samples_per_shard=9) as writer:
        for i in range(first, first + count):
            picture = np.random.default_rng(i).integers(0, 256, (8, 8, 4), dtype=np.uint8)
            writer.write(f"k{i}", Image.fromarray(picture), f"number {i}", {"split": "train"})
    return folder


class Run:
    """A run folder, and the processes that work on it."""

    def __init__(self, processes, folder: Path, shards: Path, said: Path | None = None, **trainer) -> None:
        self.processes, self.folder = processes, folder
        self.said = said or folder.with_suffix(".log")
        settings = {f"trainer.{key}": value for key, value in {**COMMON, **trainer}.items()}
        settings |= {"trainer.output_dir": folder, "data.shards": shards}
        self.args = [f"{key}={value}" for key, value in settings.items()]

    def start(self, *more: str, env: dict[str, str] | None = None, largest_file: int = 0):
        args = ([*self.args, *more], str(self.said), env or {}, largest_file)
        process = self.processes.Process(target=forked, args=args)
        process.start()
        return process

    def finish(self, *more: str, ranks: int = 1, code: int = 0) -> str:
        """Let it end, on so many ranks joined by gloo; gives what it said in this time."""
        before = len(self.output())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        envs = [
            {**master, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)} for r in range(ranks)
        ]
        children = [self.start(*more, env=env if ranks > 1 else None) for env in envs]
        for child in children:
            child.join(WAIT)
        said = self.output()[before:]
        assert [child.exitcode for child in children] == [code] * ranks, said
        return said

    def output(self) -> str:
        return self.said.read_text() if self.said.exists() else ""

    def steps(self) -> int:
        """How many steps the newest complete checkpoint holds."""
        newest = checkpoint.latest(self.folder)
        return int(newest.name.split("_")[1]) if newest else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written at this moment, or was when its writer died."""
        return any(self.folder.glob("checkpoints/.step_*.partial"))

    def tensors(self, steps: int) -> dict[str, torch.Tensor]:
        folder = checkpoint.step_folder(self.folder, steps)
        return {
            f"{path.stem}/{name}": tensor
            for path in sorted([*folder.glob("*.safetensors"), self.folder / "net.safetensors"])
            for name, tensor in load_file(path).items()
        }

    def trace(self) -> list[tuple]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["samples"], line["loss"], line["grad_norm"]) for line in lines]


def kill_once(run: Run, while_saving: bool, patience: float) -> bool:
    """Start the run, kill it after it has made headway; whether it died within a save."""
    before, child = run.steps(), run.start("trainer.checkpoint_every=1")
    newest = checkpoint.step_folder(run.folder, before + 1)
    deadline = time.monotonic() + WAIT
    while not newest.exists():  # headway: one step more than before
        assert child.is_alive() and time.monotonic() < deadline, run.output()
        time.sleep(0.001)
    while while_saving and not run.saving() and child.is_alive():
        assert time.monotonic() < deadline
    if not while_saving:
        time.sleep(patience)
    child.kill()
    child.join()
    assert child.exitcode == -9, run.output()
    return run.saving()


def check_kills(processes, tmp_path: Path, shards: Path, anywhere: int, saving: int, steps: int) -> None:
    """So many kills at random moments and within saves; each leaves a checkpoint that loads and is gone on from."""
    whole = Run(processes, tmp_path / "whole", shards, steps=steps)
    killed = Run(processes, tmp_path / "killed", shards, steps=steps)
    whole.finish()
    chance, within, done = random.Random(0), 0, 0
    while within < saving or done < anywhere + saving:
        within += kill_once(killed, while_saving=within < saving, patience=chance.random() * 0.1)
        done += 1
        assert done < 3 * (anywhere + saving), f"only {within} of {done} kills fell within a save"
        tensors, state = checkpoint.load(checkpoint.latest(killed.folder))
        assert state["step"] == killed.steps() > 0 and "optimizer" in tensors
    said = killed.finish()
    assert f"resumed at step {state['step']}" in said
    one, two = whole.tensors(steps), killed.tensors(steps)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert whole.trace() == killed.trace() and len(whole.trace()) == steps
    assert not killed.saving()


def test_three_kills_change_nothing(processes, tmp_path, shards):
    check_kills(processes, tmp_path, shards, anywhere=1, saving=2, steps=40)


@pytest.mark.slow
def test_twenty_kills_change_nothing(processes, tmp_path, shards):
    check_kills(processes, tmp_path, shards, anywhere=10, saving=10, steps=400)


def noted(prefix: Path, ranks: int) -> list[list[str]]:
    """The keys of every step over all ranks, in the order of the ranks."""
    files = [Path(f"{prefix}.{rank}").read_text().splitlines() for rank in range(ranks)]
    return [[key for part in step for key in json.loads(part)] for step in zip(*files, strict=True)]


def test_the_samples_are_the_same_on_any_ranks_and_when_these_change(processes, tmp_path, shards):
    """1, 2 and 4 gloo processes, and 2 that go on as 1 or 4."""
    seen = {}
    for plan in ([(1, 11)], [(2, 11)], [(4, 11)], [(2, 5), (1, 11)], [(2, 5), (4, 11)]):
        name = "-".join(str(ranks) for ranks, _ in plan)
        run = Run(processes, tmp_path / name, shards, decay_fraction=0.0)
        seen[name] = []
        for ranks, steps in plan:
            said = run.finish(f"trainer.steps={steps}", f"noted={tmp_path}/{name}.{steps}", ranks=ranks)
            seen[name] += noted(tmp_path / f"{name}.{steps}", ranks)
        assert ("resumed at step 5" in said) == (len(plan) == 2)
        assert [row[:2] for row in run.trace()] == [(step, 4 * step) for step in range(1, 12)]
    assert len(seen["1"]) == 11 and all(steps == seen["1"] for steps in seen.values())
    keys = [key for step in seen["1"] for key in step]
    assert set(keys[:22]) == set(keys[22:]) == {f"k{i}" for i in range(22)}  # two epochs, each sample once


def test_more_ranks_than_samples(processes, tmp_path):
    """Three pictures on four ranks: every rank has one at each step, and each picture comes equally often."""
    run = Run(processes, tmp_path / "run", write(tmp_path / "shards", 3), steps=3)
    run.finish(f"noted={tmp_path}/keys", ranks=4)
    keys = [key for step in noted(tmp_path / "keys", 4) for key in step]
    assert Counter(keys) == {"k0": 4, "k1": 4, "k2": 4}


@pytest.mark.slow
def test_torchrun_gives_every_rank_its_part(processes, tmp_path, shards):
    run = Run(processes, tmp_path / "run", shards, steps=3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(Path(__file__).with_name("resume_toy.py")), *run.args, f"noted={tmp_path}/many"]
    subprocess.run(command, check=True, capture_output=True)
    one = Run(processes, tmp_path / "one", shards, steps=3)
    one.finish(f"noted={tmp_path}/one")
    assert noted(tmp_path / "many", 2) == noted(tmp_path / "one", 1)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk of its own without the right to mount one; see the test with a limit on files")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def check_full(whole: Run, run: Run, said: str) -> None:
    """A save failed with `said`: the old checkpoint is whole, and with room again the run ends as `whole` does."""
    assert "free some disk space" in said and "Traceback" not in said
    checkpoint.load(checkpoint.step_folder(run.folder, 4))
    assert run.steps() == 4 and not run.saving()
    assert "resumed at step 4" in run.finish()
    whole.finish()
    one, two = whole.tensors(8), run.tensors(8)
    assert all(torch.equal(one[name], two[name]) for name in one) and whole.trace() == run.trace()


def test_a_full_disk_stops_the_run_with_its_checkpoint_intact(processes, tmp_path, shards, small_disk):
    whole = Run(processes, tmp_path / "whole", shards, steps=8, decay_fraction=0.0)
    run = Run(processes, small_disk / "run", shards, tmp_path / "run.log", steps=8, decay_fraction=0.0)
    run.finish("trainer.steps=4")
    (small_disk / "filler").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    said = run.finish(code=2)
    (small_disk / "filler").unlink()
    check_full(whole, run, said)


def test_files_that_may_not_grow_stop_the_run_with_its_checkpoint_intact(processes, tmp_path, shards):
    whole = Run(processes, tmp_path / "whole", shards, steps=8, decay_fraction=0.0)
    run = Run(processes, tmp_path / "run", shards, steps=8, decay_fraction=0.0)
    run.finish("trainer.steps=4")
    before = len(run.output())
    child = run.start(largest_file=100_000)
    child.join(WAIT)
    assert child.exitcode == 2
    check_full(whole, run, run.output()[before:])


def test_shards_that_changed_under_a_run_are_refused_until_put_back(processes, tmp_path):
    shards = write(tmp_path / "shards", 18)
    run = Run(processes, tmp_path / "run", shards, decay_fraction=0.0)
    run.finish("trainer.steps=2")
    moved = tmp_path / "aside"
    moved.mkdir()
    for name in ("00001.parquet", "00001_stats.json", "00001.tar"):
        shutil.move(shards / name, moved / name)
    said = run.finish("trainer.steps=4", code=2)
    assert "error:" in said and "training data" in said and "output_dir" in said and "Traceback" not in said
    shutil.move(moved / "00001.parquet", shards)
    said = run.finish("trainer.steps=4", code=2)
    assert "00001.tar is missing" in said and "put the tar back" in said
    for path in moved.iterdir():
        shutil.move(path, shards)
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2])
    said = run.finish("trainer.steps=4", code=2)
    assert "00001.tar: truncated" in said and "again" in said
    (shards / "00001.tar").write_bytes(whole)
    assert "resumed at step 2" in run.finish("trainer.steps=4") and len(run.trace()) == 4
