"""Watches a run learn: sheets of base beside adapted, losses on held-out, seen and own pictures, the best step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusionfm.checkpoint import writing
from diffusionfm.finetune.methods import Adapting
from diffusionfm.finetune.pictures import Sample, collate
from diffusionfm.images import contact_sheet, in_common, save_png
from diffusionfm.pipeline import DiffusionFMPipeline

VALIDATION_SAMPLES = 64  # what the validation loss is taken over, the held-out pictures repeated
SHEET_CELL = 192  # pixels a picture, so that its prompt fits below it
OTHER_SAMPLES = 32  # as many of the pictures trained on, and of the model's own


class Judge:
    """Draws and validates for the trainer, keeps the best weights, and says when to stop.

    The losses, each beside the base model's: `validation_loss` on held-out pictures, `seen_loss` on some that are
    trained on, `own_loss` on pictures that the base model drew of its own prompts. All are on fixed noise and
    evenly spread times: the same weights give the same numbers.
    """

    def __init__(
        self,
        pipe: DiffusionFMPipeline,
        objective: Adapting,
        sets: dict[str, list[Sample]],
        prompts: list[str],
        out: Path,
        patience: int = 0,
    ):
        """sets: the pictures of each loss, under validation, seen and own. patience: in steps, 0 for ever."""
        self.pipe, self.objective, self.prompts, self.out = pipe, objective, prompts, out
        counts = {"validation": VALIDATION_SAMPLES, "seen": OTHER_SAMPLES, "own": OTHER_SAMPLES}
        self.sets = {name: _repeated(sets[name], count) for name, count in counts.items()}
        self.patience = patience
        self.stop: Callable[[], None] = lambda: None
        self.stopped = ""
        self.base_pictures: list[Image.Image] = []
        self.base_losses: dict[str, float] = {}
        self.last: dict[str, float] = {}

    @torch.no_grad()
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
        labels = [label for prompt in self.prompts for label in (prompt, f"step {step}")]
        both = [picture for pair in pairs for picture in pair]
        with writing(file):
            sheet = contact_sheet(both, labels, columns=min(4, len(labels)), cell=SHEET_CELL)
            settings = self.pipe.settings()
            told = in_common([self.pipe.describe(p, 0, settings) for p in self.prompts])
            if step:  # half of it is drawn by other weights than those that were loaded
                told.pop("model_hash", None)
            save_png(sheet, file, told)

    def draw_best(self) -> None:
        """Draw the best step too, unless that was drawn."""
        step = int(self.objective.best.step)
        if not (self.out / "samples" / f"{step:07d}.png").exists():
            with self.objective.best.in_place(self.objective.weights):
                self.draw(step)

    def validate(self, step: int, networks: Any = None) -> dict[str, float]:
        """The losses, and how far training has moved the output. ValueError where it changes nothing.

        The weights are kept if they are the best yet; the run is stopped if that was `patience` steps ago."""
        if not self.base_losses:
            with self.objective.base():
                self.base_losses, self.base_output = self.losses(), self.output()
        change = float((self.output() - self.base_output).norm() / self.base_output.norm())
        if not change > 0:
            raise ValueError(f"training changes nothing after {step} steps: take a higher lr and a new --out")
        losses, best = self.losses(), self.objective.best
        best.offer(step, losses["validation_loss"], self.objective.weights)
        if self.patience and step - int(best.step) >= self.patience:
            self.stopped = f"no better validation loss since step {int(best.step)}"
            self.stop()
        base = {f"base_{name}": loss for name, loss in self.base_losses.items()}
        self.last = {**losses, **base, "change": change, "best_step": int(best.step)}
        return self.last

    def losses(self) -> dict[str, float]:
        """The three losses of the networks as they are."""
        return {
            f"{name}_loss": self.objective.validation_loss(batch["latent"], batch["caption"], repeats=2)
            for name, batch in self.sets.items()
        }

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the denoiser says to a few noisy latents."""
        batch = self.sets["validation"]
        x = torch.randn(batch["latent"][:4].shape, generator=torch.Generator().manual_seed(0))
        text, mask = self.objective.read(batch["caption"][:4])
        return self.objective.denoiser(x.to(text.device), torch.ones(len(x), device=text.device), text, mask)


def _repeated(samples: list[Sample], count: int) -> dict[str, Any]:
    """The first `count` samples as a batch, few ones repeated."""
    assert samples
    return collate((samples * -(-count // len(samples)))[:count])
