"""Which optimiser moves what, at which rate, and the schedule."""

import sys
from pathlib import Path

import pytest
from torch import nn

from diffusionfm import optim

sys.path.insert(0, str(Path(__file__).parent))
from trainer_toy import Toy  # noqa: E402


def test_muon_takes_the_block_matrices_only():
    net = Toy()
    optimizers = optim.build_optimizers({"net": net}, "muon", weight_decay=0.3)
    muon = [p for group in optimizers["muon"].param_groups for p in group["params"]]
    assert [id(p) for p in muon] == [id(block.weight) for block in net.blocks]
    for group in optimizers["adamw"].param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    total = sum(len(g["params"]) for o in optimizers.values() for g in o.param_groups)
    assert total == len(list(net.parameters()))
    with pytest.raises(ValueError, match="use adamw"):
        optim.build_optimizers({"net": nn.Linear(2, 2)}, "muon")


def test_a_network_may_learn_at_a_rate_of_its_own():
    nets = {"fast": Toy(), "slow": Toy()}
    optimizers = optim.build_optimizers(nets, "muon", scales={"slow": 0.1})
    optim.set_lr(optimizers, 0.5)
    slow = {id(p) for p in nets["slow"].parameters()}
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == 2 * len(slow)
    assert all(group["lr"] == (0.05 if id(p) in slow else 0.5) for group in groups for p in group["params"])
    with pytest.raises(ValueError, match="lr_scale names text_encoder"):
        optim.build_optimizers(nets, scales={"text_encoder": 0.1})


def test_the_schedule_rises_stays_and_falls():
    rates = [optim.wsd(step, 100, 10, 0.2) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71
    falls = [a - b for a, b in zip(rates[79:], [*rates[80:], 0.0], strict=True)]
    assert min(rates) > 0 and falls == pytest.approx([falls[0]] * 21)
    assert rates[:80] == [optim.wsd(step, 1000, 10, 0.2) for step in range(80)]
    assert [optim.wsd(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5
