"""Runs that go on: from where they stopped, after kills and damage, lengthened, or refused before anything is lost."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionfm import checkpoint
from diffusionfm.checkpoint import CheckpointError
from diffusionfm.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from trainer_toy import Denoise, Toy, ToyBatches, config, metrics, same_end, train  # noqa: E402

TOY = str(Path(__file__).parent / "trainer_toy.py")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", [0.0, 0.15])
def test_twenty_steps_are_seven_and_six_and_seven(tmp_path, capsys, optimizer, precision, decay):
    """With a decay, the run goes on from before its earlier end was in sight; without, from its very end."""
    settings = {"optimizer": optimizer, "precision": precision, "decay_fraction": decay}
    train(tmp_path / "whole", steps=20, **settings)
    for steps in (7, 13, 20):
        torch.rand(3)
        noise = {"on_sample": lambda step, networks: torch.randn(5)}
        train(tmp_path / "parts", steps=steps, callbacks=noise, sample_every=2, **settings)
    said = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert said == ([7, 13] if decay == 0 else [6, 11])
    same_end(tmp_path / "whole", tmp_path / "parts", 20)


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_end(tmp_path):
    common = [
        "trainer.steps=40",
        "trainer.checkpoint_every=1",
        "trainer.tracker=none",
        "trainer.batch_size=8",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def command(folder: Path, *more: str) -> list[str]:
        return [sys.executable, TOY, f"trainer.output_dir={folder}", *common, *more]

    subprocess.run(command(whole), check=True, capture_output=True)
    for delay in (0.02, 0.23, 0.41):
        child = subprocess.Popen(
            command(killed, "pause=0.02"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before, deadline = checkpoint.latest(killed), time.monotonic() + 300
        while checkpoint.latest(killed) == before and time.monotonic() < deadline:
            time.sleep(0.05)  # until it has got somewhere: how long that takes depends on the machine
        time.sleep(delay)
        child.kill()
        child.wait()
        assert checkpoint.latest(killed) != before
    done = subprocess.run(command(killed), check=True, capture_output=True, text=True)
    assert "resumed at step" in done.stdout
    same_end(whole, killed, 40)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(tmp_path, number, code):
    command = [sys.executable, TOY, f"trainer.output_dir={tmp_path}", "trainer.steps=500", "pause=0.05"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == code and f"stopped by {number.name} at step" in out
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, len(metrics(tmp_path)))
    assert (tmp_path / "net.safetensors").exists()


def stopped(folder: Path, at: int, **settings) -> Path:
    """A run that stops after `at` steps."""
    trainer = Trainer(
        config(folder, validate_every=at, **settings),
        Denoise(Toy()),
        ToyBatches(),
        validate=lambda step, networks: trainer.stop() or {},
    )
    trainer.fit()
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FALLING = {"decay_fraction": 0.5, "checkpoint_every": 4}


@pytest.mark.parametrize("steps", [18, 40])
def test_another_end_while_the_rate_falls_is_refused_before_anything_is_lost(tmp_path, steps):
    torch.manual_seed(0)
    run = stopped(tmp_path / "run", 16, steps=20, **FALLING)
    before = contents(run)
    lost = r"towards step 20\. .* go back to step 10 and lose the checkpoints of steps 12, 16\. Put trainer.steps=20"
    with pytest.raises(ValueError, match=lost) as error:
        train(run, steps=steps, **FALLING)
    assert "trainer.discard=true" in str(error.value) and "trainer.output_dir" in str(error.value)
    assert contents(run) == before
    train(run, steps=20, **FALLING)
    train(tmp_path / "whole", steps=20, **FALLING)
    same_end(tmp_path / "whole", run, 20)


def test_what_would_be_lost_may_be_given_up(tmp_path, capsys):
    torch.manual_seed(0)
    run = stopped(tmp_path / "run", 16, steps=20, **FALLING)
    train(run, steps=24, discard=True, **FALLING)
    said = capsys.readouterr().out
    assert "resumed at step 10" in said and "given up: the checkpoints of steps 12, 16" in said
    train(tmp_path / "whole", steps=24, **FALLING)
    same_end(tmp_path / "whole", run, 24)
    before = contents(run / "checkpoints")
    train(
        run, steps=12, discard=True, **FALLING
    )  # fewer steps than it has taken: it has ended, and keeps them
    assert contents(run / "checkpoints") == before


def test_where_the_rate_fell_from_the_start_there_is_nothing_to_go_back_to(tmp_path, capsys):
    run = stopped(tmp_path, 4, steps=20, decay_fraction=1.0, warmup=0)
    train(run, steps=8, decay_fraction=1.0, warmup=0)
    said = capsys.readouterr().out
    assert "resumed at step 4" in said and "it rises again" in said and "given up" not in said


def test_other_data_and_another_stage_are_refused_and_the_run_goes_on(tmp_path):
    class Known(ToyBatches):
        fingerprint = "one"

    class Other(ToyBatches):
        fingerprint = "other"

    train(tmp_path, data=Known(), steps=2, decay_fraction=0.0)
    with pytest.raises(
        ValueError, match="training data .*is other, was one; take another trainer.output_dir"
    ):
        train(tmp_path, data=Other(), decay_fraction=0.0)

    class Stage(Denoise):
        def networks(self):
            return {"decoder": self.net}

    with pytest.raises(ValueError, match="it trained net, this config trains decoder; take another"):
        Trainer(config(tmp_path), Stage(Toy()), Known()).fit()
    with pytest.raises(
        ValueError, match="batch_size=9 does not divide into 1 processes x trainer.grad_accum=2"
    ):
        train(tmp_path / "new", batch_size=9, grad_accum=2)
    train(tmp_path, data=Known(), decay_fraction=0.0)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"net/enter.weight is \[16, 4\], was \[8, 4\].*output_dir"):
        train(tmp_path, net=Toy(16), steps=8)
    with pytest.raises(ValueError, match="trainer.optimizer is muon, was adamw"):
        train(tmp_path, optimizer="muon", steps=8)
    train(tmp_path, steps=8)


def test_a_finished_run_runs_no_step_and_mends_its_export(tmp_path, capsys):
    train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    weights = load_file(tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors").unlink()
    train(tmp_path)
    assert "resumed at step 4" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before
    again = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    train(tmp_path, steps=6, checkpoint_every=2, decay_fraction=0.0)
    (checkpoint.step_folder(tmp_path, 6) / "optimizer.safetensors").write_bytes(b"cut")
    train(tmp_path, steps=8, decay_fraction=0.0)
    assert "resumed at step 4" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))


def test_a_stream_is_read_from_where_the_run_goes_on(tmp_path):
    class Streamed(ToyBatches):
        starts, closed = [], 0

        def stream(self, start):
            self.starts.append(start)
            try:
                while True:
                    yield self.batch(start)
                    start += 1
            finally:
                type(self).closed += 1

    for steps in (5, 9):
        train(tmp_path / "stream", steps=steps, data=Streamed(), decay_fraction=0.0)
    train(tmp_path / "plain", steps=9, decay_fraction=0.0)
    assert Streamed.starts == [0, 5] and Streamed.closed == 2
    same_end(tmp_path / "stream", tmp_path / "plain", 9)


def test_a_save_that_fails_leaves_the_run_usable(tmp_path, no_file_beyond):
    train(tmp_path, steps=4, decay_fraction=0.0)
    with no_file_beyond(4000), pytest.raises(CheckpointError, match="free some disk space"):
        train(tmp_path, steps=8, decay_fraction=0.0)
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 4)
    train(tmp_path, steps=8, decay_fraction=0.0)
