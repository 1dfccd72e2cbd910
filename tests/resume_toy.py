"""A toy network trained on real shards, for the tests that kill: python tests/resume_toy.py [key=value ...]."""

import json
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.training import DataConfig, picture_batches
from diffusionfm.trainer import Trainer, TrainerConfig

sys.path.insert(0, str(Path(__file__).parent))
from trainer_toy import Denoise, Toy  # noqa: E402


@dataclass
class ResumeConfig:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    width: int = 256
    noted: str | None = (
        None  # each rank appends the keys of every step it trains on to this name and its rank
    )


class MeanColours(Denoise):
    """Denoise the mean colours of pictures, noting which pictures they were."""

    def __init__(self, width: int, noted: str | None) -> None:
        super().__init__(Toy(width))
        self.noted = noted and f"{noted}.{os.environ.get('RANK', '0')}"

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.noted:
            with open(self.noted, "a") as file:
                file.write(json.dumps(batch["key"]) + "\n")
        return super().forward({"x": batch["picture"].float().mean((2, 3)) / 255})


def main(argv: list[str] | None = None) -> None:
    cfg = parse_args(ResumeConfig, argv)
    with user_errors():
        torch.manual_seed(0)
        data = picture_batches(cfg.data, cfg.trainer.batch_size, cfg.trainer.seed)
        objective = MeanColours(cfg.width, cfg.noted)
        Trainer(cfg.trainer, objective, data, resolved_config=cfg).fit()


def forked(argv: list[str], said: str, env: dict[str, str], largest_file: int = 0) -> None:
    """`main` in a process forked for it; what it says goes to the file `said`.

    env: set before, as a launcher would. largest_file: bytes beyond which writing fails, as on a full disk."""
    os.environ.update(env)
    handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main(argv)


if __name__ == "__main__":
    main()
