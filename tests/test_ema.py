"""Averages of the weights: the profile asked for, several widths at once, any width after the fact."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_toy import Denoise, Toy, ToyBatches

from diffusionfm import checkpoint, ema
from diffusionfm.trainer import Trainer, TrainerConfig


def _train(folder, **changes):
    given = {"steps": 120, "batch_size": 8, "lr": 1e-2, "warmup": 3, "device": "cpu", "precision": "fp32"}
    given |= {"tracker": "none", "decay_fraction": 0.0, "checkpoint_every": 10, "ema": [0.05, 0.1]}
    torch.manual_seed(0)
    cfg = TrainerConfig(output_dir=str(folder), **given | changes)
    return Trainer(cfg, Denoise(Toy()), ToyBatches()).fit()


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_the_average_has_the_width_asked_for(sigma):
    net = nn.Linear(1, 1, bias=False)
    steps = 400
    average = ema.PowerEMA({"w": net.weight}, sigma)
    profile = torch.zeros(steps)
    for step in range(1, steps + 1):
        beta = (1 - 1 / step) ** (average.gamma + 1)
        profile *= beta
        profile[step - 1] += 1 - beta
        with torch.no_grad():
            net.weight.fill_(step)
        average.update(step)
    weights = profile.double().numpy()
    times = np.arange(1, steps + 1) / steps
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    assert np.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(sigma, rel=0.03)
    assert average.average["w"].item() == pytest.approx(mean * steps, rel=1e-3)
    with average.swapped_in():
        assert net.weight.item() == average.average["w"].item()
    assert net.weight.item() == steps


@pytest.mark.parametrize("width", [0.06, 0.075, 0.15])
def test_a_width_made_afterwards_is_the_one_tracked(tmp_path, width):
    """Against what the run itself averaged at that width, and against what the nearest kept width would give."""
    run = _train(tmp_path / "two")
    tracked = _train(tmp_path / "one", ema=width)
    truth = load_file(tracked / "net.safetensors")
    made, missed = ema.reconstruct(run, width)
    assert made.keys() == {f"net/{name}" for name in truth} and missed < 0.1
    last = ema.snapshots(run)
    kept = [load_file(last[w][120]) for w in (0.05, 0.1)]

    def distance(tensors):
        return sum(float((tensors[f"net/{k}"].float() - v).square().sum()) for k, v in truth.items()) ** 0.5

    scale = sum(float(v.square().sum()) for v in truth.values()) ** 0.5
    assert distance(made) < 2e-3 * scale
    assert distance(made) < 0.25 * min(map(distance, kept))


def test_a_kept_width_comes_back_and_profiles_match_their_integrals():
    coefficients, missed = ema.mix([(0.05, 50), (0.05, 100), (0.1, 100)], 0.1, 100)
    assert coefficients == pytest.approx([0, 0, 1], abs=1e-6) and missed < 1e-6
    grid = (np.arange(200_000) + 0.5) / 200_000

    def profile(gamma, time):
        return np.where(grid <= time, (gamma + 1) * grid**gamma / time ** (gamma + 1), 0.0)

    for a, b in ((2.0, 5.0), (16.97, 6.94)):
        for first, second in ((0.4, 1.0), (1.0, 0.7), (0.5, 0.5)):
            numeric = (profile(a, first) * profile(b, second)).mean()
            exact = ema._inner(*(np.float64(x) for x in (a, first, b, second)))
            assert exact == pytest.approx(numeric, rel=1e-3)


def test_snapshots_are_few_and_survive_a_resume(tmp_path):
    _train(tmp_path / "whole", steps=40, checkpoint_every=1)
    for steps in (17, 40):
        _train(tmp_path / "parts", steps=steps, checkpoint_every=1)
    found = [ema.snapshots(tmp_path / name) for name in ("whole", "parts")]
    steps = set(found[0][0.05])
    assert steps == set(range(4, 41, 4)) and len(steps) <= ema.MOST_SNAPSHOTS
    for width in (0.05, 0.1):
        assert found[1][width].keys() == steps
        for step in steps:
            one, two = (load_file(kept[width][step]) for kept in found)
            assert all(torch.equal(one[key], two[key]) for key in one)
            assert {value.dtype for value in one.values()} == {torch.float16}
    state = [checkpoint.load(checkpoint.step_folder(tmp_path / n, 40))[0] for n in ("whole", "parts")]
    assert all(torch.equal(state[0]["ema_1"][key], state[1]["ema_1"][key]) for key in state[0]["ema_1"])
    assert not ema.snapshots(_train(tmp_path / "single", steps=4, ema=0.1))


def test_the_command_writes_weights_to_go_on_from(tmp_path, capsys):
    run = _train(tmp_path / "run", steps=40)
    out = tmp_path / "out"
    ema.main([str(run), "--width", "0.07", "--step", "30", "--out", str(out)])
    said = capsys.readouterr().out
    assert str(out / "net.safetensors") in said and "width 0.07" in said
    made, _ = ema.reconstruct(run, 0.07, 30)
    written = load_file(out / "net.safetensors")
    assert written.keys() == Toy().state_dict().keys()
    assert all(torch.equal(value, made[f"net/{key}"]) for key, value in written.items())
    again = _train(tmp_path / "again", steps=1, lr=0.0, ema=0.0, init=str(out))
    assert torch.equal(load_file(again / "net.safetensors")["enter.weight"], written["enter.weight"])


def test_what_cannot_be_reconstructed_is_said(tmp_path, capsys):
    run = _train(tmp_path / "run", steps=20)
    single = _train(tmp_path / "single", steps=2, ema=0.1)
    for folder, width, step, words in (
        (run, 0.5, None, "EMA width must be above 0 and below"),
        (single, 0.07, None, "trainer.ema="),
        (run, 0.07, 15, "no snapshot at step 15; there are 10, 20"),
    ):
        with pytest.raises(ValueError, match=words):
            ema.reconstruct(folder, width, step)
    with pytest.raises(SystemExit) as stopped:
        ema.main([str(run), "--width", "0.07", "--out", str(run)])
    assert stopped.value.code == 2 and "new or an empty folder" in capsys.readouterr().err
    path = ema.snapshots(run)[0.1][20]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step_00000020.safetensors cannot be read"):
        ema.reconstruct(run, 0.07)


@pytest.mark.parametrize("setting", ["wide", [0.1, 0.1], [0.1, 0.9], True, {"a": 1}])
def test_widths_that_are_none_are_refused(setting):
    with pytest.raises(ValueError, match="EMA width|trainer.ema"):
        TrainerConfig(ema=setting)


def test_another_width_does_not_go_on_with_the_old_average(tmp_path):
    run = _train(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"trainer.ema is \[0.1\], was \[0.05, 0.1\]"):
        _train(tmp_path, steps=4, ema=0.1)
    assert json.loads((checkpoint.latest(run) / "state.json").read_text())["ema"] == [0.05, 0.1]
