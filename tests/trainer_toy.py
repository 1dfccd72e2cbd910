"""A tiny run that the trainer's tests start as a process: python tests/trainer_toy.py [key=value ...]."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffusionfm.config import parse_args, user_errors
from diffusionfm.trainer import Trainer, TrainerConfig


@dataclass
class ToyConfig:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    width: int = 8
    pause: float = 0.0


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


class ToyBatches:
    """`size` samples a step over all ranks, each a pure function of its place."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.split(0, 1)

    def split(self, rank: int, world: int) -> None:
        self.places = range(rank * self.size // world, (rank + 1) * self.size // world)

    def batch(self, step: int) -> dict:
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(1000 * step + i)) for i in self.places]
        return {"x": torch.stack(rows), "key": [f"{step}-{i}" for i in self.places]}


def main() -> None:
    cfg = parse_args(ToyConfig)
    torch.manual_seed(0)
    objective = Denoise(Toy(cfg.width), cfg.pause)
    with user_errors():
        data = ToyBatches(cfg.trainer.batch_size)
        Trainer(cfg.trainer, objective, data, resolved_config=cfg).fit()


if __name__ == "__main__":
    main()
