"""Checkpoints: whole or not at all, checked when read; warm starts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from diffusionfm import checkpoint


def _state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    shared = torch.full((4, 4), value)
    return {"net": {"a": shared, "tied": shared, "turned": shared[:2].T}, "ema": {"b": torch.tensor(value)}}


def test_save_and_load_are_exact(tmp_path):
    folder = checkpoint.save(checkpoint.step_folder(tmp_path, 3), _state(0.1), {"step": 3})
    tensors, state = checkpoint.load(folder)
    assert state["step"] == 3
    for name, group in _state(0.1).items():
        assert all(torch.equal(tensors[name][key], value) for key, value in group.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "net.safetensors",
        "state.json",
    ]


def test_latest_passes_over_broken_ones_and_prune_keeps_the_stable_one(tmp_path, capsys):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), _state(step), {"step": step})
    (checkpoint.step_folder(tmp_path, 5) / "net.safetensors").write_bytes(b"half")
    broken = checkpoint.step_folder(tmp_path, 4) / "state.json"
    broken.write_text(broken.read_text()[:20])
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 3)
    assert "net.safetensors is damaged" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path, lambda state: state["step"] < 3) == checkpoint.step_folder(tmp_path, 2)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(checkpoint.step_folder(tmp_path, 5))
    checkpoint.prune(tmp_path, keep=2, stable=2)
    assert [path.name[-1] for path in checkpoint.listing(tmp_path)] == ["2", "4", "5"]
    checkpoint.discard_after(tmp_path, 4)
    assert [path.name[-1] for path in checkpoint.listing(tmp_path)] == ["2", "4"]
    assert checkpoint.latest(tmp_path / "elsewhere") is None


def test_a_bit_flip_is_seen(tmp_path):
    folder = checkpoint.save(checkpoint.step_folder(tmp_path, 1), _state(1), {})
    path = folder / "net.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoint.find_fault(folder) == "net.safetensors is damaged"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    target = checkpoint.save(checkpoint.step_folder(tmp_path, 1), _state(1), {"step": 1})
    code = (
        "import resource, signal, sys, torch; from diffusionfm import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save(sys.argv[1], {'net': {'a': torch.zeros(100_000)}}, {})\n"
        "except checkpoint.CheckpointError as error: print('stopped:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, env=os.environ
    )
    assert "stopped:" in done.stdout and "free some disk space" in done.stdout, done
    assert checkpoint.load(target)[1]["step"] == 1
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_warm_start_is_strict_and_names_what_is_fresh(tmp_path):
    source, target, other = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
    checkpoint.write_weights(
        tmp_path / "net.safetensors", {k: v.half() for k, v in source.state_dict().items()}
    )
    assert checkpoint.warm_start({"net": target, "other": other}, tmp_path) == "net (fresh: other)"
    assert target.weight.dtype == torch.float32
    assert torch.equal(target.weight, source.weight.half().float())
    assert checkpoint.warm_start({"any": target}, tmp_path / "net.safetensors") == "any"
    with pytest.raises(ValueError, match="does not fit net"):
        checkpoint.warm_start({"net": other}, tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.warm_start({"net": target}, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint.warm_start({"vae": target}, tmp_path)
    (tmp_path / "net.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="net.safetensors cannot be read"):
        checkpoint.warm_start({"net": target}, tmp_path)


def test_warm_start_fills_in_tied_names(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    weights = {key: value + 1 for key, value in net.state_dict().items() if key != "b.weight"}
    checkpoint.write_weights(tmp_path / "net.safetensors", weights)
    checkpoint.warm_start({"net": net}, tmp_path)
    assert torch.equal(net["b"].weight, weights["a.weight"])


def test_differences_name_a_few():
    assert checkpoint.differences({"a": [1]}, {"a": [1]}) == ""
    words = checkpoint.differences({"a": [1], "b": [2], "d": [4]}, {"a": [2], "c": [3], "e": [5]})
    assert "a is [2], was [1]" in words and "and 2 more" in words


def test_json_is_replaced_whole(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "x.json", {"a": torch.zeros(1)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
