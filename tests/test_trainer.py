"""The training loop: guards, callbacks, the run folder, exports, compiled networks, ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusionfm import checkpoint, cost, guard
from diffusionfm.trainer import Trainer, TrainingDiverged

sys.path.insert(0, str(Path(__file__).parent))
from trainer_toy import Denoise, Restore, Toy, ToyBatches, config, metrics, same_end, train  # noqa: E402

TOY = str(Path(__file__).parent / "trainer_toy.py")


def test_the_run_folder_tells_the_story(tmp_path):
    seen, live = [], Toy()
    settings = {
        "steps": 10,
        "validate_every": 5,
        "sample_every": 4,
        "checkpoint_every": 4,
        "decay_fraction": 0.0,
    }

    def look(step, networks):
        assert not networks["net"].training and not torch.is_grad_enabled()
        seen.append((step, networks["net"].leave.weight.clone()))
        return {"heldout_loss": 0.5}

    run = train(
        tmp_path, net=live, callbacks={"on_sample": look, "validate": look}, tracker="tensorboard", **settings
    )
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 11)) and lines[-1]["samples"] == 80
    wanted = {"loss", "level", "lr", "grad_norm", "images_per_s", "wait_s", "seconds"}
    assert all(wanted <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "heldout_loss" in line] == [5, 10]
    assert [step for step, _ in seen] == [4, 5, 8, 10, 10] and live.training
    exported = load_file(run / "net.safetensors")
    assert torch.equal(exported["leave.weight"], seen[-1][1])
    assert not torch.equal(exported["leave.weight"], live.leave.weight)
    assert [path.name[-2:] for path in checkpoint.listing(run)] == ["08", "10"]
    ledger = json.loads((run / "ledger.json").read_text())
    assert (ledger["steps"], ledger["samples"], ledger["flops"]) == (10, 80, 8000)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["shapes"]["net/enter.weight"] == [8, 4]
    assert (
        (run / "config.yaml").exists() and (run / "samples").is_dir() and any((run / "tensorboard").iterdir())
    )


def test_it_learns(tmp_path):
    lines = metrics(train(tmp_path, steps=150, decay_fraction=0.2))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_a_metric_is_the_mean_of_the_pieces_that_tell_it(tmp_path):
    class Some(Denoise):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            told = {
                "some": 3.0 if self.calls % 2 else math.nan,
                "none": math.nan,
                "all": float(self.calls % 2),
            }
            return super().forward(batch)[0], {name: torch.tensor(value) for name, value in told.items()}

    Trainer(config(tmp_path, grad_accum=2, steps=2), Some(Toy()), ToyBatches()).fit()
    for line in metrics(tmp_path):
        assert (line["some"], line["none"], line["all"]) == (3.0, None, 0.5)


def test_flops_are_of_the_shapes_that_there_were(tmp_path):
    class Growing(Denoise):
        flops_per_sample = 0

        def forward(self, batch):
            self.flops_per_sample += 100
            return super().forward(batch)

    Trainer(config(tmp_path, steps=3), Growing(Toy()), ToyBatches()).fit()
    each = metrics(tmp_path)[0]["samples"]
    assert json.loads((tmp_path / "ledger.json").read_text())["flops"] == each * (100 + 200 + 300)


def test_pieces_add_up_to_the_batch(tmp_path):
    class Plain(Denoise):
        def forward(self, batch):
            return (self.net(batch["x"]) - batch["x"]).square().mean(), {}

    for name, pieces in (("one", 1), ("four", 4)):
        torch.manual_seed(0)
        net = Toy()
        net.drop.p = 0.0
        Trainer(config(tmp_path / name, grad_accum=pieces), Plain(net), ToyBatches()).fit()
    one, four = (metrics(tmp_path / name) for name in ("one", "four"))
    assert [m["loss"] for m in four] == pytest.approx([m["loss"] for m in one], rel=1e-4)
    with pytest.raises(ValueError, match="grad_accum=3"):
        train(tmp_path / "three", grad_accum=3)


def test_a_loss_that_is_not_a_number_stops_before_the_weights_move(tmp_path):
    class Poisoned(ToyBatches):
        def batch(self, step):
            batch = super().batch(step)
            batch["x"][0] += float("nan") if step == 6 else 0.0
            return batch

    with pytest.raises(TrainingDiverged, match="at step 7") as error:
        train(tmp_path, steps=10, checkpoint_every=3, data=Poisoned())
    assert isinstance(error.value, ValueError) and isinstance(error.value, FloatingPointError)
    dumped = json.loads((tmp_path / "diverged.json").read_text())
    assert dumped["step"] == 7 and dumped["key"] == [f"6-{i}" for i in range(8)]
    kept = tmp_path / "bad_batches" / "step_00000007"
    assert json.loads((kept / "rank0.json").read_text())["key"] == dumped["key"]
    assert load_file(kept / "rank0.safetensors")["x"].isnan().any()
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 6)
    train(tmp_path, steps=10)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 11))


class Leaping(ToyBatches):
    """Batches a thousand times too large at some steps, counted from 0."""

    def __init__(self, *bad: int):
        super().__init__()
        self.bad = bad

    def batch(self, step):
        batch = super().batch(step)
        batch["x"] *= 1000 if step in self.bad else 1
        return batch


def test_a_leaping_step_is_skipped_named_and_kept(tmp_path, capsys):
    """Its weights are those before it, and a run resumed in between decides alike."""
    for steps in (56, 66):  # the statistics judge from step 51
        train(tmp_path / "parts", steps=steps, data=Leaping(53, 60), decay_fraction=0.0)
    train(tmp_path / "whole", steps=66, data=Leaping(53, 60), decay_fraction=0.0, checkpoint_every=53)
    same_end(tmp_path / "whole", tmp_path / "parts", 66)
    assert "step 54 skipped: loss" in capsys.readouterr().out
    skipped = {m["step"]: m["skipped"] for m in metrics(tmp_path / "whole") if "skipped" in m}
    assert skipped == {54: 1, 61: 2}
    assert json.loads((tmp_path / "whole" / "ledger.json").read_text())["skipped"] == 2
    kept = sorted(path.name for path in (tmp_path / "whole" / "bad_batches").iterdir())
    assert kept == ["step_00000054", "step_00000061"]
    record = json.loads((tmp_path / "whole" / "bad_batches" / kept[0] / "rank0.json").read_text())
    assert record["key"] == [f"53-{i}" for i in range(8)] and "running mean" in record["what"]
    train(tmp_path / "off", steps=54, data=Leaping(53), spike=0.0)
    assert not (tmp_path / "off" / "bad_batches").exists()


def test_a_skipped_step_moves_no_weight(tmp_path):
    settings = {"decay_fraction": 0.0, "checkpoint_every": 1, "keep": 5}
    run = train(tmp_path, steps=55, data=Leaping(53), **settings)
    before, after, next_one = (
        load_file(checkpoint.step_folder(run, step) / "net.safetensors") for step in (53, 54, 55)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(after["leave.weight"], next_one["leave.weight"])


def test_leaping_on_and_on_stops_with_the_good_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"at step 58, as in the 4 steps before.*lower trainer.lr"):
        train(tmp_path, steps=70, data=Leaping(*range(53, 70)), decay_fraction=0.0, checkpoint_every=50)
    assert json.loads((tmp_path / "diverged.json").read_text())["key"][0] == "57-0"
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 50)
    train(tmp_path, steps=55, decay_fraction=0.0)


def test_a_large_batch_is_kept_in_part_and_old_ones_go(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 400)
    batch = {"x": torch.zeros(10, 20), "one": torch.tensor(1), "key": [str(i) for i in range(10)]}
    for step in range(12):
        guard.dump_batch(tmp_path / f"step_{step:08d}", batch, 0, {"step": step})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"step_{step:08d}" for step in range(12 - guard.MOST_DUMPS, 12)]
    record = json.loads((tmp_path / kept[-1] / "rank0.json").read_text())
    assert (record["samples"], record["kept"], record["key"]) == (10, 4, ["0", "1", "2", "3"])
    assert load_file(tmp_path / kept[-1] / "rank0.safetensors")["x"].shape == (4, 20)


def test_cost_is_in_the_log(tmp_path):
    run = train(tmp_path, steps=3)
    lines, ledger = metrics(run), json.loads((run / "ledger.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    for line in lines:
        rate = environment["matrix_flops_per_s"]
        assert line["mfu"] == pytest.approx(line["images_per_s"] * Denoise.flops_per_sample / rate)
    assert 0 < lines[0]["kwh"] < lines[-1]["kwh"] == pytest.approx(ledger["kwh"])
    assert ledger["energy"] == environment["energy"]
    matrix = torch.zeros(8, 16)
    assert cost.count_flops(lambda: matrix @ matrix.T) == 2 * 8 * 16 * 8


def test_counters_of_energy_are_read_and_wrap(tmp_path, monkeypatch):
    """A powercap tree as Linux lays it out, in a folder of its own."""
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("9000000\n")
    (zone / "name").write_text("package-0\n")
    whole = tmp_path / "intel-rapl:1"  # the machine, with the package within it: not counted again
    whole.mkdir()
    for name, told in (("energy_uj", "5000000"), ("max_energy_range_uj", "10000000"), ("name", "psys")):
        (whole / name).write_text(told)
    (zone / "max_energy_range_uj").write_text("10000000\n")
    monkeypatch.setattr(cost, "POWERCAP", tmp_path)
    first, second = (cost.Energy(torch.device("cpu"), local_rank=rank) for rank in (0, 1))
    assert first.method == "rapl: the CPU packages"
    (zone / "energy_uj").write_text("9500000\n")
    assert first.read() == pytest.approx(0.5)
    (zone / "energy_uj").write_text("200000\n")
    assert first.read() == pytest.approx(0.7) and second.read() == 0.0
    monkeypatch.setattr(cost, "POWERCAP", tmp_path / "none")
    guessed = cost.Energy(torch.device("cpu"))
    assert "estimate: 10 W a thread" in guessed.method and guessed.read() > 0


def test_a_tracker_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ValueError, match="pip install trackio"):
        train(tmp_path / "run", tracker="trackio")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="trainer.tracker must be one of tensorboard, trackio, none"):
        config(tmp_path, tracker="wandb")


def test_warm_start_and_no_average(tmp_path, capsys):
    train(tmp_path / "first", ema=0.0)
    train(tmp_path / "second", init=str(tmp_path / "first"), ema=0.0, lr=0.0)
    assert "warm start from" in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "net.safetensors") for name in ("first", "second"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_frozen_parameters_stay_and_are_exported(tmp_path):
    net = Toy()
    net.enter.requires_grad_(False)
    before = net.enter.weight.clone()
    train(tmp_path, net=net, optimizer="muon")
    exported = load_file(tmp_path / "net.safetensors")
    assert torch.equal(exported["enter.weight"], before)
    assert "net/enter.weight" not in load_file(checkpoint.latest(tmp_path) / "ema.safetensors")


def test_sixteen_bit_masters_and_strays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fp32 masters"):
        train(tmp_path, net=Toy().bfloat16())
    objective = Denoise(Toy())
    objective.judge = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="judge.weight of Denoise"):
        Trainer(config(tmp_path), objective, ToyBatches())
    with pytest.raises(ValueError, match="nothing to train"):
        train(tmp_path, net=Toy().requires_grad_(False))


def test_stop_ends_early_and_saves(tmp_path):
    trainer = Trainer(
        config(tmp_path, steps=50, validate_every=5),
        Denoise(Toy()),
        ToyBatches(),
        validate=lambda step, networks: trainer.stop() or {"score": 1.0},
    )
    trainer.fit()
    assert trainer.step == 5 and checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 5)


def test_models_are_exported_as_folders(tmp_path):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Model(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 8):
            super().__init__()
            self.toy = Toy(width)

        def forward(self, x):
            return self.toy(x)

    run = train(tmp_path, net=Model(width=4), checkpoint_every=2)
    again = Model.from_pretrained(run / "net")
    exported = load_file(run / "net.safetensors")
    assert again.config.width == 4
    assert all(torch.equal(value, exported[key]) for key, value in again.state_dict().items())


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_sample_uncompiled(tmp_path):
    shapes = {"on_sample": lambda step, networks: networks["net"](torch.randn(3, 4))}
    for steps in (3, 5):
        train(tmp_path, steps=steps, compile=True, sample_every=1, callbacks=shapes)
    assert load_file(tmp_path / "net.safetensors").keys() == Toy().state_dict().keys()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, "blocks"])
def test_compiled_losses_are_the_eager_ones(tmp_path, compiled):
    def losses(folder, **changes):
        torch.manual_seed(0)
        Trainer(config(folder, **changes), Restore("transformer"), ToyBatches()).fit()
        return [(m["loss"], m["grad_norm"]) for m in metrics(folder)]

    eager, fast = losses(tmp_path / "eager"), losses(tmp_path / "fast", compile=compiled)
    for one, two in zip(eager, fast, strict=True):
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_two_ranks_learn_as_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["trainer.steps=6", "trainer.batch_size=8", "trainer.tracker=none", "trainer.precision=fp32"]
    command = [*launch, TOY, f"trainer.output_dir={tmp_path}", *more]
    for steps in (6, 9):
        done = subprocess.run(
            [*command, f"trainer.steps={steps}"], capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10)) and lines[-1]["samples"] == 72
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 2
