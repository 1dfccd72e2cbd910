"""Ray: a killed worker costs a retry and no byte, an item that kills is given up, errors come home as they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusionfm import ray_jobs
from diffusionfm.batch import generate_batch
from diffusionfm.data.shapes import shape_samples
from diffusionfm.data.shards import ShardWriter
from diffusionfm.precompute import corpus
from diffusionfm.precompute.encoder import EncoderConfig
from tests.conftest import build_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("ray", reason="ray is not installed: pip install -c constraints.txt '.[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(autouse=True)
def this_machine_alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of 15, workers starve beside whatever else is running


def test_a_killed_worker_costs_a_retry_and_an_error_comes_home(tmp_path):
    folder = str(tmp_path)

    def work(item: int) -> int:
        tried = os.path.join(folder, f"tried-{item}")
        if item == 1 and not os.path.exists(tried):
            open(tried, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        while item == 4 and not os.path.exists(os.path.join(folder, "enough")):
            time.sleep(0.05)
        if item == 4:
            raise ValueError("item 4 is bad")
        return item * item

    got = []
    with pytest.raises(ValueError) as told:
        for result in ray_jobs.each(work, range(5), workers=2):
            got.append(result)
            if len(got) == 4:
                (tmp_path / "enough").touch()
    assert sorted(got) == [0, 1, 4, 9] and (tmp_path / "tried-1").exists()
    assert str(told.value) == "item 4 is bad"


def test_an_item_that_kills_its_worker_each_time_is_given_up(tmp_path):
    folder = str(tmp_path)

    def work(item: int) -> int:
        open(os.path.join(folder, str(os.getpid())), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(ValueError, match="a worker died 4 times"):
        list(ray_jobs.each(work, [0], workers=1))
    assert len(list(tmp_path.iterdir())) == 1 + ray_jobs.RETRIES


def test_a_group_that_kills_is_done_in_parts(tmp_path):
    def work(group: list[int]) -> list[int]:
        if 2 in group:
            os.kill(os.getpid(), signal.SIGKILL)
        return group

    def lost(group: list[int], why: str) -> tuple[list[list[int]], list[list[int]]]:
        half = len(group) // 2
        return ([group[:half], group[half:]], []) if half else ([], [[-group[0]]])

    got = list(ray_jobs.each(work, [[0, 1, 2, 3], [4]], workers=2, lost=lost))
    assert sorted(got) == [[-2], [0, 1], [3], [4]]


def test_precompute_with_a_worker_killed_gives_the_bytes_of_a_local_run(tiny_model, tmp_path):
    with ShardWriter(tmp_path / "pictures", samples_per_shard=16) as writer:
        for key, picture, caption, meta in shape_samples(96, 32, seed=0):
            writer.write(key, picture, caption, meta)
    places = {name: str(tiny_model / name) for name in ("vae", "text_encoder", "tokenizer")}
    cfg = EncoderConfig(**places, batch_size=1, device="cpu")
    alone = corpus.precompute(tmp_path / "pictures", tmp_path / "alone", cfg) / "latents"

    told = [f"{name}={place}" for name, place in places.items()] + ["trainer.batch_size=1"]
    told += [
        f"shards={tmp_path / 'pictures'}",
        f"trainer.output_dir={tmp_path / 'run'}",
        "engine=ray",
        "workers=2",
    ]
    recipe = str(ROOT / "train/precompute.py")
    with open(tmp_path / "said", "w") as said:
        child = subprocess.Popen([sys.executable, recipe, *told], stdout=said, stderr=said)
        try:
            whole, deadline = corpus.MAKING.format("*") + "/*_stats.json", time.monotonic() + 400
            while not list((tmp_path / "run").glob(whole)):
                assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.01)
            victim = busiest(psutil.Process(child.pid))
            victim.send_signal(signal.SIGKILL)
            assert child.wait(timeout=400) == 0, (tmp_path / "said").read_text()
        finally:
            child.kill()
    assert not victim.is_running()
    files = {path.name: path.read_bytes() for path in alone.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run/latents").iterdir()}


def test_a_batch_on_ray_is_that_of_one_process(tiny_pipe, tmp_path):
    rows = [{"id": f"r{k}", "prompt": f"a fish {k}", "width": 32 + 16 * (k % 2)} for k in range(12)]
    rows += [{"id": "bad", "prompt": ""}]
    same = {"deterministic": True, "sheets": 0, "progress": False}
    generate_batch(rows, tiny_pipe, tmp_path / "alone", **same)
    summary = generate_batch(rows, tiny_pipe, tmp_path / "ray", engine="ray", workers=2, **same)
    assert (summary.made, summary.failed) == (12, 1)
    alone, ray = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}
        for name in ("alone", "ray")
    )
    assert len(ray) == 12 and ray == alone


def test_a_batch_outlives_a_killed_worker(tiny_model, tmp_path):
    (tmp_path / "rows.txt").write_text("".join(f"a fish {k}\n" for k in range(40)))
    command = [sys.executable, "-m", "diffusionfm.cli", "batch", str(tmp_path / "rows.txt"), "--steps", "60"]
    command += ["--out", str(tmp_path / "out"), "--model", str(tiny_model), "--device", "cpu"]
    command += ["--batch-size", "2", "--engine", "ray", "--workers", "2", "--quiet"]
    manifest = tmp_path / "out" / "manifest.jsonl"
    with open(tmp_path / "said", "w") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 400
            while not manifest.exists() or not manifest.stat().st_size:
                assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.01)
            victim = busiest(psutil.Process(child.pid))
            victim.send_signal(signal.SIGKILL)
            assert child.wait(timeout=400) == 0, (tmp_path / "said").read_text()
        finally:
            child.kill()
    assert not victim.is_running()
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("*.png")
    }
    assert len(records) == 40 and files == {record["file"]: record["sha256"] for record in records}


def test_a_pipeline_in_memory_alone_cannot_go_to_workers(tmp_path):
    with pytest.raises(ValueError, match="save it with save_pretrained"):
        generate_batch(["fish"], build_tiny_pipeline(), tmp_path, engine="ray", progress=False)


def busiest(driver: psutil.Process) -> psutil.Process:
    """A worker of this driver that is at an item: ray names the process after its task."""
    while True:
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "ray::job":
                    return process
        time.sleep(0.005)
