"""Ray: a killed worker costs a retry and no byte, an item that kills is given up, errors come home as they are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusionfm import ray_jobs
from diffusionfm.data.shapes import shape_samples
from diffusionfm.data.shards import ShardWriter
from diffusionfm.precompute import corpus
from diffusionfm.precompute.encoder import EncoderConfig

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("ray", reason="ray is not installed: pip install -c constraints.txt '.[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(autouse=True)
def this_machine_alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


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


def busiest(driver: psutil.Process) -> psutil.Process:
    """A worker of this driver that is at an item: ray names the process after its task."""
    while True:
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "ray::job":
                    return process
        time.sleep(0.005)
