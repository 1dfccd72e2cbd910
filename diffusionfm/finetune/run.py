"""A fine-tuning run from end to end: pictures checked and encoded, the one Trainer, the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from diffusionfm.checkpoint import write_json, writing
from diffusionfm.checks import check_model, read_defaults, read_json
from diffusionfm.data.archive import as_folder
from diffusionfm.data.captions import TRIGGER
from diffusionfm.data.folder import PictureDataset, first_samples, some
from diffusionfm.data.language import UNTOLD
from diffusionfm.data.order import Batches
from diffusionfm.data.preflight import Preflight
from diffusionfm.devices import rank_device
from diffusionfm.finetune import pictures
from diffusionfm.finetune.export import load_back
from diffusionfm.finetune.judge import Judge
from diffusionfm.finetune.methods import build
from diffusionfm.finetune.pictures import Sample, Say
from diffusionfm.finetune.report import REPORT, outcome, verdict, write_report
from diffusionfm.finetune.settings import (
    RECORD,
    FinetuneConfig,
    check_out,
    check_record,
    check_settings,
    load_preset,
    scale_preset_lr,
)
from diffusionfm.locks import LOCK, locked
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.trainer import Trainer, TrainingDiverged

Progress = Callable[[int, int, float], object]  # (step, steps, loss); True stops after that step


def configure(
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    preset: str = "laptop",
    **chosen: Any,
) -> FinetuneConfig:
    """The config of a preset with what was chosen in it, None being the preset's own.

    Keys are those of FinetuneConfig and, without a prefix, of its trainer. Without an lr, method full
    takes a tenth of the preset's."""
    cfg = load_preset(preset)
    cfg.data, cfg.trainer.output_dir = str(data), str(out)
    for key, value in chosen.items():
        place = cfg if hasattr(cfg, key) else cfg.trainer
        assert hasattr(place, key), key
        if value is not None:
            setattr(place, key, value)
    if chosen.get("lr") is None:
        scale_preset_lr(cfg)
    return cfg


def finetune(
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    preset: str = "laptop",
    steps: int | None = None,
    rank: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    captions: str = "refuse",
    method: str | None = None,
    text_encoder: bool = False,
    trigger: str = "",
    prior: float = 0.0,
    seed: int = 0,
    prompts: Sequence[str] = (),
    sample_every: int | None = None,
    patience: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    say: Say = print,
) -> Path:
    """Adapt a model to pictures; the same call again goes on where it stopped. Returns `out`.

    `out` gets a PEFT LoRA (`pipe.load_lora(out)`), with method full a pipeline folder; report.html, preflight.png,
    samples/ (the model beside the adapted one), metrics.jsonl and checkpoints/. Nothing is written to `data`.
    What is None is the preset's; the other settings are those of FinetuneConfig.
    progress(step, steps, loss) is called in every step; returning True saves and stops. say: gets the report
    on the pictures, and what follows, line by line. Raises ValueError as `run` does.
    """
    cfg = configure(
        data, out, preset=preset, model=None if model is None else str(model), steps=steps, rank=rank, lr=lr,
        batch_size=batch_size, captions=captions, method=method, text_encoder=text_encoder, trigger=trigger,
        prior=float(prior), seed=seed, prompts=list(prompts), sample_every=sample_every, patience=patience,
        device=device,
    )  # fmt: skip
    return run(cfg, progress, say)


def check(cfg: FinetuneConfig, say: Say = print) -> Preflight:
    """Only look: say what the pictures are, and write preflight.json and preflight.png; nothing is trained.

    Raises ValueError, once these are written, where `run` would refuse the pictures."""
    out = Path(cfg.trainer.output_dir)
    check_settings(cfg)
    size = read_defaults(check_model(cfg.model))["height"]
    with as_folder(cfg.data) as folder:
        check_out(out, Path(cfg.data))
        report, found = pictures.look_through(folder, size, cfg.captions, cfg.data, say)
        pictures.write_preflight(out, report, first_samples(found, size))
        PictureDataset(report, found, size, cfg.captions)
    return report


def run(cfg: FinetuneConfig, progress: Progress | None = None, say: Say = print, bar: bool = True) -> Path:
    """Fine-tune as a config says; see `finetune`. bar: whether a progress bar is shown.

    Raises ValueError, before anything is written, for settings out of range, a folder without usable pictures
    and captions, and an output folder that holds anything but the same run, or that another process writes; and
    TrainingDiverged.
    """
    out = Path(cfg.trainer.output_dir)
    first = os.environ.get("RANK", "0") == "0"  # of many ranks: it speaks and holds the folder for all
    check_settings(cfg)
    source = check_model(cfg.model)
    check_out(out, Path(cfg.data))
    with _alone(out) if first else nullcontext():
        return _run(cfg, out, source, progress, say if first else lambda text: None, bar)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the run folder, made where it is missing; a run that is refused leaves none."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        try:
            yield
        except BaseException:
            if [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                with suppress(OSError):  # somebody else has put something there
                    for folder in made:
                        folder.rmdir()
            raise


def _run(
    cfg: FinetuneConfig, out: Path, source: Path, progress: Progress | None, say: Say, bar: bool
) -> Path:
    """`run`, once the settings are known to be fit and the folder is held."""
    with as_folder(cfg.data) as folder:
        size = read_defaults(source)["height"]
        report, found = pictures.look_through(folder, size, cfg.captions, cfg.data, say)
        dataset = PictureDataset(report, found, size, cfg.captions)
        shown = first_samples(dataset.pictures, size)
        pipe = DiffusionFMPipeline.from_pretrained(
            source, dtype="float32", device=rank_device(cfg.trainer.device)
        )
        pipe.phrasebook = None  # words are read as they are, for it is words that are taught
        _say_language(report, say)
        known = {"base": pipe.base_hash, **cfg.signature()}
        check_record(out, known)
        samples, digest = pictures.encode(pipe, dataset, cfg.trigger, say)
    known["data"] = digest
    check_record(out, known)
    if _ended(out, cfg):
        say(f"{out} is done: {read_json(out / RECORD)['ended']['why']}")
        return out
    session = Session(cfg, pipe, samples, known, say, bar)
    if session.main:
        pictures.write_preflight(out, report, shown)
    session.train(progress)
    if session.main and session.complete:
        session.finish(report)
    return out


def _say_language(report: Preflight, say: Say) -> None:
    """A word of warning when most captions that tell are in another language than most models are taught."""
    told = {language: count for language, count in report.languages.items() if language != UNTOLD}
    likely = max(told, key=lambda language: told[language], default="English")
    if likely != "English":
        say(f"the captions are likely {likely}: the shipped model was taught English ones and reads no other")


def _ended(out: Path, cfg: FinetuneConfig) -> bool:
    """Whether the run stopped early before, with the same steps and patience to go on with."""
    ended = read_json(out / RECORD).get("ended") if (out / RECORD).is_file() else None
    return ended is not None and ended["early"] and (ended["steps"], ended["patience"]) == _length(cfg)


def _length(cfg: FinetuneConfig) -> tuple[int, int]:
    return cfg.trainer.steps, cfg.patience


class Session:
    """One sitting of a run: everything built, from the samples to the trainer, ready to train."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        pipe: DiffusionFMPipeline,
        samples: list[Sample],
        known: dict[str, Any],
        say: Say,
        bar: bool = True,
    ):
        self.cfg, self.say, self.known, self.count = cfg, say, known, len(samples)
        self.out = Path(cfg.trainer.output_dir)
        self.objective = build(pipe, cfg)
        train, self.held_out = pictures.hold_out(samples, cfg.trainer.seed)
        own, prior = self._own_pictures(pipe, train)
        where = f"{len(self.held_out)} pictures held out"
        where = where if self.held_out else "the training pictures, too few to hold some out"
        more = f" and {len(prior)} of the model's own" if prior else ""
        say(f"{len(train)} pictures to train on{more}; validation loss on {where}")
        sets = {"validation": self.held_out or train, "seen": train, "own": own}
        prompts = [prompt.replace(TRIGGER, cfg.trigger) for prompt in cfg.prompts]
        prompts = prompts or pictures.sheet_prompts(self.held_out + train)
        patience = cfg.patience * cfg.trainer.validate_every
        self.judge = Judge(pipe, self.objective, sets, prompts, self.out, patience)
        weights = pictures.mixture(train, prior, cfg.prior)
        batch_size, seed = cfg.trainer.batch_size, cfg.trainer.seed
        data = Batches([*train, *prior], pictures.collate, batch_size, seed, weights=weights, workers=0)
        self.trainer = Trainer(
            cfg.trainer, self.objective, data, resolved_config=cfg, bar=bar,
            on_sample=self.judge.draw, validate=self.judge.validate,
        )  # fmt: skip
        self.judge.stop = self.trainer.stop
        pipe.to(self.trainer.device)
        self.trainer.accelerator.wait_for_everyone()  # every rank has looked at the folder before one writes
        self.main = self.trainer.accelerator.is_main_process
        if self.main:
            self._begin(own, prior)

    def _own_pictures(
        self, pipe: DiffusionFMPipeline, train: list[Sample]
    ) -> tuple[list[Sample], list[Sample]]:
        """What the base model draws of its own prompts, or drew when the run began."""
        file = self.out / pictures.OWN
        kept = load_file(file) if file.is_file() else None
        with self.objective.base():
            return pictures.own_pictures(pipe, self.cfg, train, kept, self.say)

    def _begin(self, own: list[Sample], prior: list[Sample]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._record()
        pictures.keep_own(self.out, own, prior)
        self.judge.draw(0)

    def _record(self, **more: Any) -> None:
        held = [sample["key"] for sample in self.held_out]
        write_json(self.out / RECORD, {**self.known, "pictures": self.count, "held_out": held, **more})

    def train(self, progress: Progress | None) -> None:
        """Train to the end, or to where `progress` or a signal stops it. TrainingDiverged names the pictures."""
        if progress is not None:

            def report(module: nn.Module, args: tuple, output: tuple[Tensor, Any]) -> None:
                loss = output[0].item()
                if progress(self.trainer.step + 1, self.cfg.trainer.steps, loss) is True:
                    self.trainer.stop()

            self.objective.register_forward_hook(report)
        try:
            self.trainer.fit()
        except TrainingDiverged as error:
            if not self.main:
                raise
            raise TrainingDiverged(self._diverged()) from error

    def _diverged(self) -> str:
        """What went wrong, with which pictures, and what a fine-tuning can do about it."""
        file = self.out / "diverged.json"
        told = read_json(file)
        return (
            f"{told['what']} at step {told['step']}, with {some(told['key'])} (all are named in {file}): look at "
            "these pictures and their captions, or take a lower --lr and a new --out"
        )

    @property
    def complete(self) -> bool:
        """Whether the run came to its own end, and was not stopped from outside."""
        return bool(self.judge.stopped) or self.trainer.step >= self.cfg.trainer.steps

    def finish(self, report: Preflight) -> None:
        """What was exported loaded back, the best step's sheet, the record, report.html, and the verdict, said.

        ValueError, before the run counts as ended, where the export does not draw what was trained."""
        whole, best = self.cfg.method == "full", self.objective.best
        with best.in_place(self.objective.weights):
            difference = load_back(self.out, self.judge.pipe, self.cfg.model, whole)
        steps, patience = _length(self.cfg)
        early, step = bool(self.judge.stopped), self.trainer.step
        why = f"took all {steps} steps"
        if early:
            why = f"stopped at step {step} of {steps}: {self.judge.stopped}"
        elif step > steps:
            why = f"had taken {step} steps before, more than the {steps} asked for now"
        found, held_out = outcome(self.out), bool(self.held_out)
        ended = {"why": why, "early": early, "step": step, "steps": steps, "patience": patience}
        self._record(ended=ended, results=found.numbers())
        self.judge.draw_best()
        write_report(self.out, self.cfg, report, found, why, held_out)
        for line in verdict(found, held_out):
            self.say(line)
        self.say(f"loaded back, {self.out} draws the same picture (within {difference} of 255)")
        self.say(f"it {why}; the report is {self.out / REPORT}")
