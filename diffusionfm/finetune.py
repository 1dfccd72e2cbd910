"""Your pictures, your prompts: a LoRA on the denoiser, trained by the one Trainer from a loaded pipeline."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from diffusionfm import lora
from diffusionfm.checkpoint import write_json, write_weights
from diffusionfm.checks import check_model, check_prompt, check_seed, read_defaults, read_json
from diffusionfm.data.folder import FolderDataset, preflight, square
from diffusionfm.data.order import Batches, Order
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import choose_caption, pixels
from diffusionfm.images import contact_sheet
from diffusionfm.objectives import FlowMatching, as_float
from diffusionfm.pipeline import DiffusionFMPipeline, pick_device
from diffusionfm.text import truncated_words
from diffusionfm.trainer import Trainer, TrainerConfig

Progress = Callable[[int, int, float], object]  # (step, steps, loss); True stops after that step
Say = Callable[[str], object]
Samples = list[dict[str, Any]]  # {"key", "latent" (c, y, x), "captions", "heldout"} of each picture

ADAPTER = "default"
RECORD = "finetune.json"
MAX_STEPS, MAX_RANK, MAX_BATCH, MAX_LR = 100_000, 256, 1024, 0.1
MAX_HELD_OUT = 64
SHEET_PROMPTS = 4
VALIDATION_SAMPLES = 64  # what the validation loss is taken over, the held-out pictures repeated


def trainer_defaults() -> TrainerConfig:
    """For 10 to 50 pictures, in minutes on two CPU cores."""
    return TrainerConfig(
        output_dir="runs/finetune", steps=300, batch_size=16, lr=1e-3, warmup=20, decay_fraction=0.3, ema=0.05,
        checkpoint_every=100, sample_every=100, validate_every=50, tracker="none",
    )  # fmt: skip


@dataclass
class FinetuneConfig:
    """Keys of a fine-tuning run; `trainer.output_dir` becomes the LoRA's folder.

    data: pictures with captions, as FolderDataset takes them, or a folder of shards. model: a pipeline folder,
    null for the shipped one. captions: refuse, name or skip pictures without one. alpha: LoRA scale times rank,
    0 for the rank itself. prompts: what the sample sheets draw, empty for some of the captions.
    """

    data: str = "my-pictures"
    model: str | None = None
    captions: str = "refuse"
    rank: int = 16
    alpha: int = 0
    prompts: list[str] = field(default_factory=list)
    objective: dict = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=trainer_defaults)


def finetune(
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    steps: int = 300,
    rank: int = 16,
    lr: float = 1e-3,
    batch_size: int = 16,
    captions: str = "refuse",
    seed: int = 0,
    prompts: Sequence[str] = (),
    sample_every: int = 100,
    device: str = "auto",
    progress: Progress | None = None,
    say: Say = print,
) -> Path:
    """Adapt a model to a folder of pictures; the same call again goes on where it stopped. Returns `out`.

    `out` gets a PEFT LoRA (`pipe.load_lora(out)`), samples/ (the model beside the adapted one), metrics.jsonl
    with the validation losses of both, and checkpoints/. Nothing is written to `data`.
    progress(step, steps, loss) is called in every step; returning True saves and stops. say: gets the report
    on the pictures, and what follows, line by line. Raises ValueError as `run` does.
    """
    trainer = trainer_defaults()
    trainer.output_dir, trainer.steps, trainer.batch_size, trainer.lr = str(out), steps, batch_size, lr
    trainer.seed, trainer.sample_every, trainer.device = seed, sample_every, device
    path = None if model is None else str(model)
    cfg = FinetuneConfig(str(data), path, captions, rank, prompts=list(prompts), trainer=trainer)
    return run(cfg, progress, say)


def run(cfg: FinetuneConfig, progress: Progress | None = None, say: Say = print) -> Path:
    """Fine-tune as a config says; see `finetune`.

    Raises ValueError, before anything is written, for settings out of range, a folder without usable pictures
    and captions, and an output folder that holds anything but the same run; and TrainingDiverged.
    """
    settings, out = cfg.trainer, Path(cfg.trainer.output_dir)
    _check(cfg)
    folder = check_model(cfg.model)
    _check_out(out, Path(cfg.data))
    dataset = open_pictures(cfg.data, read_defaults(folder)["height"], cfg.captions, say)

    pipe = DiffusionFMPipeline.from_pretrained(folder, dtype="float32", device=pick_device(settings.device))
    _check_rank(pipe.transformer, cfg.rank)
    known = {"base": pipe.fingerprint(), "rank": cfg.rank, "alpha": cfg.alpha or cfg.rank, "lr": settings.lr}
    known |= {"batch_size": settings.batch_size, "optimizer": settings.optimizer, "seed": settings.seed}
    _check_record(out, known)
    samples, digest = encode(pipe, dataset, say)
    _check_record(out, known | {"data": digest})

    train, held_out = hold_out(samples, settings.seed)
    where = (
        f"{len(held_out)} pictures held out"
        if held_out
        else "the training pictures, too few to hold some out"
    )
    say(f"{len(train)} pictures to train on; validation loss on {where}")
    objective = LoraFlowMatching(pipe, cfg.rank, cfg.alpha or cfg.rank, settings.seed, **cfg.objective)
    judge = Judge(pipe, objective, held_out or train, cfg.prompts or sheet_prompts(held_out + train), out)
    data = Batches(train, collate, settings.batch_size, settings.seed, workers=0)
    trainer = Trainer(
        settings, objective, data, resolved_config=cfg, on_sample=judge.draw, validate=judge.validate
    )
    pipe.to(trainer.device)
    if trainer.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        held = [s["key"] for s in held_out]
        write_json(out / RECORD, known | {"data": digest, "pictures": len(samples), "held_out": held})
        judge.draw(0)
    if progress is not None:

        def report(module: nn.Module, args: tuple, output: tuple[Tensor, Any]) -> None:
            if progress(trainer.step + 1, settings.steps, output[0].item()) is True:
                trainer.stop()

        objective.register_forward_hook(report)
    trainer.fit()
    if judge.last:
        say(
            f"validation loss {judge.last['validation_loss']:.4f}, the model's own {judge.base_loss:.4f}, on {where}"
        )
    return out


# ---- the pictures --------------------------------------------------------------------------------------------


def open_pictures(
    data: str | os.PathLike, size: int, captions: str, say: Say
) -> FolderDataset | ShardDataset:
    """The captioned pictures of a folder, or of the shards in it; says what was found, and what was not."""
    if any(Path(data).glob("*.tar")):
        shards = ShardDataset(data)
        say(f"{data}: {len(shards)} pictures in {len(shards.paths)} shards")
        for problem in shards.problems:
            say(f"left out: {problem}")
        return shards
    try:
        dataset = FolderDataset(data, size, captions)
    except ValueError:
        say(str(preflight(data)))
        raise
    say(str(dataset.report))
    return dataset


@torch.no_grad()
def encode(
    pipe: DiffusionFMPipeline, dataset: FolderDataset | ShardDataset, say: Say = print, batch_size: int = 16
) -> tuple[Samples, str]:
    """Every picture as a latent on the CPU, and 12 hex digits of the SHA-256 over all pictures and captions."""
    samples: Samples = []
    waiting: list[Tensor] = []
    digest, origins = hashlib.sha256(), Counter[str]()

    def flush() -> None:
        if waiting:
            latents = pipe.vae.encode(as_float(torch.stack(waiting)).to(pipe.device)).float().cpu()
            for sample, latent in zip(samples[-len(waiting) :], latents, strict=True):
                sample["latent"] = latent
            waiting.clear()

    for sample in dataset:
        meta, size = sample["meta"], pipe.defaults["height"]
        picture = (
            sample["picture"] if sample["picture"].size == (size, size) else square(sample["picture"], size)
        )
        waiting.append(pixels({"picture": picture}))
        texts = meta.get("captions") or [sample["caption"]]
        samples.append(
            {
                "key": meta.get("name") or sample["key"],
                "captions": texts,
                "heldout": meta.get("split") == "heldout",
            }
        )
        digest.update(waiting[-1].numpy().tobytes() + "\0".join(["", *texts, ""]).encode())
        origins[meta.get("caption_from") or "shards"] += 1
        if len(waiting) == batch_size:
            flush()
    flush()
    names = {"name": "file names", "txt": ".txt files"}
    say("captions: " + ", ".join(f"{count} from {names.get(name, name)}" for name, count in origins.items()))
    for sample in samples:
        lost = truncated_words(pipe.tokenizer, sample["captions"][0])
        if lost:
            say(f"caption too long: {sample['key']}: the model does not read {lost[:80]!r}")
    return samples, digest.hexdigest()[:12]


def hold_out(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """(to train on, held out): what the shards hold out, else 10 % of 10 or more pictures, 64 at most."""
    chosen = [i for i, sample in enumerate(samples) if sample["heldout"]]
    if not chosen or len(chosen) == len(samples):
        chosen = Order(len(samples), seed).epoch(0)[: len(samples) // 10].tolist()
    kept = sorted(set(range(len(samples))) - set(chosen))
    return [samples[i] for i in kept], [samples[i] for i in sorted(chosen)[:MAX_HELD_OUT]]


def collate(samples: Samples) -> dict[str, Any]:
    """Samples -> {"key": [...], "latent" (b, c, y, x), "caption": [...]}, one caption chosen for each."""
    return {
        "key": [s["key"] for s in samples],
        "latent": torch.stack([s["latent"] for s in samples]),
        "caption": [choose_caption(s["captions"], s.get("draw", 0)) for s in samples],
    }


def sheet_prompts(samples: Samples) -> list[str]:
    """The first captions of the set, each once: what the sample sheets draw when nothing else is asked for."""
    return list(dict.fromkeys(sample["captions"][0] for sample in samples))[:SHEET_PROMPTS]


# ---- the adapter ---------------------------------------------------------------------------------------------


class LoraFlowMatching(FlowMatching):
    """FlowMatching that trains, saves and exports a LoRA on the pipeline's frozen denoiser (arXiv:2106.09685)."""

    def __init__(self, pipe: DiffusionFMPipeline, rank: int, alpha: int, seed: int, **options: Any):
        super().__init__(pipe.transformer.requires_grad_(False), pipe.text_encoder, pipe.tokenizer, **options)
        targets = list(pipe.transformer.lora_targets)
        name = pipe.model_name
        self.config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets, base_model_name_or_path=name
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.config, self.denoiser, adapter_name=ADAPTER)
        self.denoiser.to(pipe.device)
        trained = {key: p for key, p in self.denoiser.named_parameters() if p.requires_grad}
        self.lora = nn.ParameterDict({key.replace(".", "/"): p for key, p in trained.items()})

    def networks(self) -> dict[str, nn.Module]:
        """The LoRA's matrices alone: all that is trained, averaged and checkpointed."""
        return {"lora": self.lora}

    def compile_networks(self) -> None:
        """Compile the denoiser, adapter and all."""
        self.denoiser.compile()

    def export(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT lays them out."""
        weights = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER, save_embedding_layers=False)
        write_weights(
            folder / lora.WEIGHTS, {f"base_model.model.{key}": value for key, value in weights.items()}
        )
        settings = {**self.config.to_dict(), "inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        write_json(folder / lora.CONFIG, plain)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The denoiser as it was, its adapter switched off, inside the `with` block."""
        layers = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


class Judge:
    """Watches a LoRA learn: sheets of the model beside the adapted one, and the validation losses of both."""

    def __init__(
        self,
        pipe: DiffusionFMPipeline,
        objective: LoraFlowMatching,
        samples: Samples,
        prompts: list[str],
        out: Path,
    ):
        self.pipe, self.objective, self.prompts, self.out = pipe, objective, prompts, out
        repeats = -(-VALIDATION_SAMPLES // len(samples))
        batch = collate(samples[:VALIDATION_SAMPLES] * repeats)
        self.latents, self.captions = batch["latent"], batch["caption"]
        self.base_pictures: list[Image.Image] = []
        self.base_loss = math.nan
        self.last: dict[str, float] = {}

    def draw(self, step: int, networks: Any = None) -> None:
        """Write samples/STEP.png: for each prompt the model's own picture and the adapted one, seed 0."""
        file = self.out / "samples" / f"{step:07d}.png"
        if step == 0 and file.exists():
            return
        file.parent.mkdir(exist_ok=True)
        if not self.base_pictures:
            with self.objective.base():
                self.base_pictures = self.pipe(self.prompts, seed=0).images
        pictures = self.pipe(self.prompts, seed=0).images if step else self.base_pictures
        pairs = zip(self.base_pictures, pictures, strict=True)
        labels = [f"{who}: {prompt}" for prompt in self.prompts for who in ("model", f"step {step}")]
        contact_sheet(
            [picture for pair in pairs for picture in pair], labels, columns=min(4, len(labels))
        ).save(file)

    def validate(self, step: int, networks: Any = None) -> dict[str, float]:
        """The validation losses, the same numbers for the same weights, and how far the adapter moves the output.

        Raises ValueError for an adapter that changes nothing.
        """
        if math.isnan(self.base_loss):
            with self.objective.base():
                self.base_loss, self.base_output = self.loss(), self.output()
        change = float((self.output() - self.base_output).norm() / self.base_output.norm())
        if not change > 0:
            raise ValueError(f"the LoRA changes nothing after {step} steps: take a higher lr and a new --out")
        self.last = {
            "validation_loss": self.loss(),
            "base_validation_loss": self.base_loss,
            "lora_change": change,
        }
        return self.last

    def loss(self) -> float:
        """Mean squared velocity error on fixed noise and evenly spread times."""
        return self.objective.validation_loss(self.latents, self.captions, repeats=2)

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the denoiser says to a few noisy latents."""
        x = torch.randn(self.latents[:4].shape, generator=torch.Generator().manual_seed(0))
        text, mask = self.objective.read(self.captions[:4])
        return self.objective.denoiser(x.to(text.device), torch.ones(len(x), device=text.device), text, mask)


# ---- what cannot be -------------------------------------------------------------------------------------------


def _check_numbers(*, steps: Any, rank: Any, batch_size: Any, lr: Any) -> None:
    limits = {"steps": (steps, MAX_STEPS), "rank": (rank, MAX_RANK), "batch_size": (batch_size, MAX_BATCH)}
    for name, (value, most) in limits.items():
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most:,}, got {value}")
    if not isinstance(lr, (int, float)) or not 0 < lr <= MAX_LR:
        raise ValueError(f"lr must be above 0 and at most {MAX_LR}, got {lr}")


def _check(cfg: FinetuneConfig) -> None:
    settings = cfg.trainer
    _check_numbers(steps=settings.steps, rank=cfg.rank, batch_size=settings.batch_size, lr=settings.lr)
    check_seed(settings.seed)
    for prompt in cfg.prompts:
        check_prompt(prompt)
    if not 0 <= cfg.alpha <= 10 * MAX_RANK:
        raise ValueError(f"alpha must be from 0 to {10 * MAX_RANK}, got {cfg.alpha}")
    pick_device(settings.device)
    if settings.init:
        raise ValueError("trainer.init is for pretraining: name the model to start from with model")


def _check_out(out: Path, data: Path) -> None:
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder: give a folder of pictures and captions")
    ours, theirs = out.resolve(), data.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ValueError(f"{out} and the pictures in {data} lie in one another: choose another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.is_dir() and not (out / RECORD).is_file() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: choose a new or an empty folder as --out")
    parent = next(folder for folder in (ours, *ours.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written: choose another --out")


def _check_record(out: Path, known: dict[str, Any]) -> None:
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


def _check_rank(denoiser: Any, rank: int) -> None:
    targets = tuple(denoiser.lora_targets)
    widths = [min(m.weight.shape) for key, m in denoiser.named_modules() if key.endswith(targets)]
    if rank > min(widths):
        raise ValueError(
            f"rank is {rank}, but the narrowest layer it adapts is {min(widths)} wide: take less"
        )
