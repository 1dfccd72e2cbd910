"""How to train: the keys under `trainer:` of every recipe's config, checked when they are read."""

from dataclasses import dataclass, field
from typing import Any

from diffusionfm.ema import widths_of

CHOICES = {
    "optimizer": ("adamw", "muon"),
    "precision": ("bf16", "fp32", "auto"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "compile": (False, True, "blocks"),
    "sharding": ("none", "fsdp", "hsdp"),
    "tracker": ("tensorboard", "trackio", "none"),
}


@dataclass
class TrainerConfig:
    """How to train; what to train is the objective's business. ValueError for settings out of range."""

    output_dir: str = "runs/run"
    steps: int = 1000
    batch_size: int = (
        64  # samples of one step, over all ranks and pieces; recipes build their batches with it
    )
    grad_accum: int = 1  # pieces in which each rank works a batch off
    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)  # network -> factor on lr for its parameters
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    optimizer: str = "adamw"  # or muon
    warmup: int = 100
    decay_fraction: float = 0.15  # the last part of the run, over which the learning rate falls to 0
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    spike: float = (
        10.0  # a step whose loss or gradient norm is so many deviations above its mean is skipped; 0 none
    )
    ema: Any = (
        0.1  # width sigma_rel of the weight average, or [0.05, 0.1]: the first is exported, and snapshots of
    )
    # all are kept, so that diffusionfm.ema gives any other width later; 0 keeps none
    precision: str = "auto"  # bf16 | fp32 | auto
    device: str = "auto"  # cpu | cuda | mps | auto
    compile: bool | str = False  # true: each network as a whole; blocks: its repeated block, far sooner ready
    sharding: str = (
        "none"  # weights and state whole on each rank, or cut over all (fsdp) or a machine's (hsdp)
    )
    seed: int = 0
    init: str | None = None  # weights to start from: a run folder, a pipeline folder or a safetensors file
    discard: bool = False  # with other steps while the rate falls: give up the checkpoints since
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 20
    sample_every: int = 1000
    validate_every: int = 1000
    tracker: str = "tensorboard"  # | trackio | none; metrics.jsonl is always written

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accum", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup", "clip", "spike", "sample_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"trainer.decay_fraction must be from 0 to 1, got {self.decay_fraction}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"trainer.betas must be two numbers from 0 to below 1, got {self.betas}")
        widths_of(self.ema)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                words = ", ".join(str(choice).lower() for choice in choices)
                raise ValueError(f"trainer.{name} must be one of {words}, got {getattr(self, name)!r}")

    def pieces(self, ranks: int) -> int:
        """How many samples each of `ranks` processes works off at a time.

        Raises ValueError unless they and `grad_accum` divide the batch.
        """
        if self.batch_size % (ranks * self.grad_accum):
            raise ValueError(
                f"trainer.batch_size={self.batch_size} does not divide into {ranks} processes x "
                f"trainer.grad_accum={self.grad_accum} equal pieces: take a multiple of {ranks * self.grad_accum}"
            )
        return self.batch_size // (ranks * self.grad_accum)
