"""The keys of a fine-tuning run, its presets, and what they may be."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_prompt, check_seed, read_json
from diffusionfm.config import load_config
from diffusionfm.data.captions import CHOICES, TRIGGER
from diffusionfm.devices import pick_device
from diffusionfm.locks import LOCK
from diffusionfm.settings import TrainerConfig

METHODS = ("lora", "dora", "full")
TARGETS = ("all", "attention")
PRESETS = ("laptop", "gpu", "multi-gpu")
RECORD = "finetune.json"
PREFLIGHT, SHEET = "preflight.json", "preflight.png"
MAX_STEPS, MAX_RANK, MAX_BATCH, MAX_LR, MAX_PRIOR = 100_000, 256, 1024, 0.1, 10.0
MAX_PROMPTS = 64
CLASS_SHARE = 3  # of a subject's prior pictures one in so many is of its class
FULL_LR = 0.1  # of a preset's learning rate, which is for adapters, when all weights are trained
# What any model may be asked for, things and scenes by turns: forgetting is measured, and prior pictures are drawn,
# with these. No scene is a prompt of the scorecard.
OWN_PROMPTS = (  # noqa: SIM905, prompts read best as one line
    "a smiling face, a red star left of a blue square, a cat, two houses, a dog, a yellow circle above a green heart, "
    "a tree, three red cars, a house, a green square right of an orange heart, a car, a cat on a mint background, "
    "an apple, a blue heart below a yellow square, a star, four flowers, a flower, a pink square and a yellow star, "
    "a pizza, an orange star left of a blue triangle, a crown, two cats, a red heart, "
    "a blue triangle above a yellow heart"
).split(", ")


def trainer_defaults() -> TrainerConfig:
    """For 10 to 50 pictures, in minutes on two CPU cores."""
    return TrainerConfig(
        output_dir="runs/finetune", steps=300, batch_size=16, lr=1e-3, warmup=20, decay_fraction=0.3, ema=0.05,
        checkpoint_every=100, sample_every=100, validate_every=25, tracker="none",
    )  # fmt: skip


@dataclass
class FinetuneConfig:
    """Keys of a fine-tuning run; `trainer.output_dir` becomes the LoRA's folder, or with method full the model's.

    data: a folder of pictures with captions, as FolderDataset takes them, a zip of one, or a folder of shards.
    model: a pipeline folder, null for the shipped one. captions: refuse, name, folder, trigger or skip pictures
    without one.
    method: lora, dora or full (every weight of the denoiser, at a tenth of a preset's learning rate).
    text_encoder: adapt that too. rank, alpha: of the adapter; alpha is its scale times the rank, 0 for the rank
    itself. targets: layers it adapts, all or attention.
    trigger: the subject's word. It takes the place of [trigger] in captions and prompts, and goes before captions
    that have neither.
    own_prompts: what the model could draw before. prior: the weight of `prior_pictures` pictures that the model
    draws of these beforehand, so that it keeps what it knows: 1 makes them half of each batch. With a trigger a third
    of them are of the captions without it: "a face of zkw" is learned beside faces that stay as they were.
    prompts: what the sample sheets draw, empty for some of the captions. patience: validations without a better
    loss after which to stop, 0 never; the best step is what is kept.
    """

    data: str = "my-pictures"
    model: str | None = None
    captions: str = "refuse"
    method: str = "lora"
    text_encoder: bool = False
    rank: int = 16
    alpha: int = 0
    targets: str = "all"
    trigger: str = ""
    prior: float = 0.0
    prior_pictures: int = 40
    own_prompts: list[str] = field(default_factory=lambda: list(OWN_PROMPTS))
    prompts: list[str] = field(default_factory=list)
    patience: int = 4
    objective: dict = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=trainer_defaults)

    def signature(self) -> dict[str, Any]:
        """What two sessions of one run must have in common, beside the model and the pictures."""
        keys = ("method", "text_encoder", "rank", "targets", "trigger", "prior", "prior_pictures")
        known = {key: getattr(self, key) for key in keys} | {"alpha": self.alpha or self.rank}
        known["own_prompts"] = list(self.own_prompts)
        if self.trigger and self.prior:
            known["class_share"] = CLASS_SHARE
        return known | {key: getattr(self.trainer, key) for key in ("lr", "batch_size", "optimizer", "seed")}


def load_preset(name: str) -> FinetuneConfig:
    """The config of a preset, configs/finetune/NAME.yaml."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use {', '.join(PRESETS)}")
    package = Path(__file__).resolve().parents[1]
    folders = [root / "configs" / "finetune" for root in (package, package.parent)]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError("the presets are missing: install the package again")
    return load_config(FinetuneConfig, found / f"{name}.yaml")


def scale_preset_lr(cfg: FinetuneConfig) -> None:
    """Where all weights are trained, make a tenth of a learning rate that is a preset's; any other stays."""
    if cfg.method == "full" and cfg.trainer.lr in {load_preset(name).trainer.lr for name in PRESETS}:
        cfg.trainer.lr *= FULL_LR


def check_settings(cfg: FinetuneConfig) -> None:
    """ValueError for a setting out of its range."""
    trainer = cfg.trainer
    for name, value, most in (
        ("steps", trainer.steps, MAX_STEPS),
        ("rank", cfg.rank, MAX_RANK),
        ("batch_size", trainer.batch_size, MAX_BATCH),
        ("prior_pictures", cfg.prior_pictures, MAX_BATCH),
    ):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most:,}, got {value}")
    if not isinstance(trainer.lr, (int, float)) or not 0 < trainer.lr <= MAX_LR:
        raise ValueError(f"lr must be above 0 and at most {MAX_LR}, got {trainer.lr}")
    if not 0 <= cfg.alpha <= 10 * MAX_RANK:
        raise ValueError(f"alpha must be from 0 to {10 * MAX_RANK}, got {cfg.alpha}")
    if not (math.isfinite(cfg.prior) and 0 <= cfg.prior <= MAX_PRIOR):
        raise ValueError(f"prior must be from 0 to {MAX_PRIOR:g}, got {cfg.prior}")
    if trainer.validate_every < 1:
        raise ValueError("trainer.validate_every must be 1 or more: the best step is told by it")
    if cfg.patience < 0:
        raise ValueError(f"patience must be 0 or more validations, got {cfg.patience}")
    for name, choices in (("method", METHODS), ("targets", TARGETS), ("captions", CHOICES)):
        if getattr(cfg, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(cfg, name)!r}")
    check_seed(trainer.seed)
    _check_words(cfg)
    pick_device(trainer.device)
    if trainer.init:
        raise ValueError("trainer.init is for pretraining: name the model to start from with model")
    if trainer.sharding != "none":
        raise ValueError("trainer.sharding is for pretraining: fine-tuning keeps every rank's weights whole")


def _check_words(cfg: FinetuneConfig) -> None:
    if not cfg.own_prompts:
        raise ValueError("own_prompts is empty: forgetting is measured on them; name a few")
    for name, prompts in (("prompts", cfg.prompts), ("own_prompts", cfg.own_prompts)):
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{name} are {len(prompts)}: give {MAX_PROMPTS} or fewer")
        for prompt in prompts:
            check_prompt(prompt)
    if cfg.trigger:
        check_prompt(cfg.trigger, "trigger")
        if len(cfg.trigger.split()) != 1 or len(cfg.trigger) > 40 or TRIGGER in cfg.trigger:
            raise ValueError(f"the trigger must be one short word such as zkw, got {cfg.trigger!r}")
    elif cfg.captions == "trigger" or any(TRIGGER in prompt for prompt in cfg.prompts):
        raise ValueError(f"{TRIGGER} stands for a trigger word: give one, as --trigger zkw")


def check_out(out: Path, data: Path) -> None:
    """ValueError when `out` holds anything but a run, lies in the pictures or they in it, or cannot be written."""
    ours, theirs = out.resolve(), data.resolve()
    if data.is_dir() and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
        raise ValueError(f"{out} and the pictures in {data} lie in one another: choose another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if RECORD not in held and held - {PREFLIGHT, SHEET, LOCK}:
        raise ValueError(f"{out} holds other files: choose a new or an empty folder as --out")
    parent = next(folder for folder in (ours, *ours.parents) if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file: choose another --out")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{parent} cannot be written ({error.strerror}): choose another --out") from error


def check_record(out: Path, known: dict[str, Any]) -> None:
    """ValueError when `out` holds a run of another base model, other data or other settings."""
    if not (out / RECORD).is_file():
        return
    before = read_json(out / RECORD)
    for key, what in {"base": "another model", "data": "other pictures or captions"}.items():
        if key in known and before.get(key) != known[key]:
            raise ValueError(f"{out} was trained on {what}: choose another --out, or remove that folder")
    for key, value in known.items():
        if before.get(key) != value:
            raise ValueError(
                f"{out} was begun with {key} {before.get(key)}, not {value}: choose another --out"
            )
