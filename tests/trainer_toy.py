"""A tiny run of the trainer's tests, in their process or as one: python tests/trainer_toy.py [key=value ...]."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusionfm import checkpoint
from diffusionfm.config import parse_args, user_errors
from diffusionfm.trainer import Trainer, TrainerConfig
from diffusionfm.transformer import DiffusionTransformer
from diffusionfm.unet import DiffusionUNet


@dataclass
class ToyConfig:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    width: int = 8
    pause: float = 0.0
    net: str = (
        "toy"  # or transformer or unet: a real denoiser and a loss that draws nothing, equal on any ranks
    )


class Toy(nn.Module):
    """Two blocks with dropout between an embedding and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.norm, self.drop, self.leave = nn.LayerNorm(width), nn.Dropout(0.1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + self.drop(block(self.norm(x)).relu())
        return self.leave(x)


class Denoise(nn.Module):
    """Remove noise drawn from the global generator, as the real objectives draw theirs."""

    flops_per_sample = 100

    def __init__(self, net: nn.Module, pause: float = 0.0) -> None:
        super().__init__()
        self.net, self.pause = net, pause

    def networks(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(self.pause)
        x = batch["x"]
        loss = (self.net(x + 0.3 * torch.randn_like(x)).float() - x).square().mean()
        return loss, {"level": x.abs().mean()}


class Gain(nn.Module):
    """One number, which no sharding can cut."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp()


class Restore(nn.Module):
    """A denoiser that reads a frozen text layer and gives its latent back: every number comes from the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        common = {"in_channels": 4, "text_dim": 8, "condition_dim": 16, "registers": 2, "heads": 2}
        if kind == "unet":
            self.net: nn.Module = DiffusionUNet(widths=(32, 64), blocks=1, text_width=32, grid=4, **common)
        else:
            self.net = DiffusionTransformer(width=32, depth=3, grid=2, **common)
        for parameter in self.net.parameters():  # zero-initialised layers would leave most gradients at 0
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        self.gain, self.text = Gain(), nn.Linear(8, 8).requires_grad_(False)

    def networks(self) -> dict[str, nn.Module]:
        return {"net": self.net, "gain": self.gain}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["latent"]
        text, mask = self.text(batch["x"].repeat(1, 2)[:, None]), torch.ones(len(x), 1, dtype=torch.bool)
        out = self.gain(self.net(x, batch["x"][:, 0].sigmoid(), text.to(x.device), mask.to(x.device)))
        return (out.float() - x).square().mean(), {"level": out.abs().mean()}


class ToyBatches:
    """`size` samples a step over all ranks, each a pure function of its place."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.split(0, 1)

    def split(self, rank: int, world: int) -> None:
        self.places = range(rank * self.size // world, (rank + 1) * self.size // world)

    def batch(self, step: int) -> dict:
        draws = [torch.Generator().manual_seed(1000 * step + i) for i in self.places]
        batch = {"x": torch.stack([torch.randn(4, generator=draw) for draw in draws])}
        batch["latent"] = torch.stack([torch.randn(4, 4, 4, generator=draw) for draw in draws])
        return batch | {"key": [f"{step}-{i}" for i in self.places]}


def config(folder: Path, **changes) -> TrainerConfig:
    """Four quick steps, with changes."""
    given = {"steps": 4, "batch_size": 8, "lr": 1e-2, "warmup": 3, "device": "cpu", "precision": "fp32"}
    return TrainerConfig(output_dir=str(folder), **given | {"tracker": "none"} | changes)


def train(folder: Path, net: nn.Module | None = None, data=None, callbacks=None, **changes) -> Path:
    """Train a Toy from seed 0; the same call goes on."""
    torch.manual_seed(0)
    objective = Denoise(net or Toy())
    return Trainer(config(folder, **changes), objective, data or ToyBatches(), **callbacks or {}).fit()


def metrics(folder: Path) -> list[dict]:
    """Every step's line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_end(a: Path, b: Path, steps: int) -> None:
    """Two runs of so many steps left the same weights and losses, bit for bit."""
    for name in ("net", "ema", "optimizer"):
        one, two = (load_file(checkpoint.step_folder(run, steps) / f"{name}.safetensors") for run in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    trace = [[(m["step"], m["loss"], m["grad_norm"], m["lr"]) for m in metrics(run)] for run in (a, b)]
    assert trace[0] == trace[1] and [row[0] for row in trace[0]] == list(range(1, steps + 1))


def main() -> None:
    cfg = parse_args(ToyConfig)
    torch.manual_seed(0)
    objective = Denoise(Toy(cfg.width), cfg.pause) if cfg.net == "toy" else Restore(cfg.net)
    with user_errors():
        data = ToyBatches(cfg.trainer.batch_size)
        Trainer(cfg.trainer, objective, data, resolved_config=cfg).fit()


if __name__ == "__main__":
    main()
