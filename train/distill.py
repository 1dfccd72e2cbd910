"""Distil the model into few steps: python train/distill.py configs/icons/distill.yaml [key=value ...]"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.order import Batches
from diffusionfm.distill import Paths, Strides, collate_strides
from diffusionfm.images import contact_sheet, in_common, save_png
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.trainer import Trainer, TrainerConfig


@dataclass
class DistillConfig:
    """Keys of a run. model: the teacher's pipeline folder, null for the shipped one.

    paths: folders that train/paths.py made, the teacher's own ways first; the student makes a step of each stride.
    student: a run of this recipe, or a pipeline folder with few_step in it, to set out from; null for the teacher.
    rank: of the LoRA that the student is. held_out: paths of the first folder that it does not learn, to validate on.
    prompts: drawn for the sample grids.
    """

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: str | None = None
    paths: list[str] = field(default_factory=lambda: ["runs/icons/paths"])
    student: str | None = None
    rank: int = 5
    held_out: int = 64
    prompts: list[str] = field(default_factory=lambda: ["a red heart", "a cat", "a rocket", "two stars"])


def main(argv: list[str] | None = None) -> Path:
    """Train RUN/few_step, which a pipeline folder may hold, and draw grids on the way; returns the run folder."""
    cfg = parse_args(DistillConfig, argv, __doc__, "python train/distill.py configs/icons/distill.yaml")
    with user_errors():
        pipe = DiffusionFMPipeline.from_pretrained(cfg.model, dtype="float32")
        paths = Paths(cfg.paths, pipe, cfg.held_out)
        objective = Strides(pipe, paths.strides, cfg.rank, cfg.trainer.seed)
        if cfg.student:
            objective.set_out_from(Path(cfg.student))
        data = Batches(paths, collate_strides, cfg.trainer.batch_size, cfg.trainer.seed)
        run = Path(cfg.trainer.output_dir)

        def on_sample(step: int, networks: dict) -> None:
            drawn = pipe(cfg.prompts, seed=0, num_inference_steps=paths.strides, guidance_scale=1.0)
            sheet = contact_sheet(drawn.images, labels=cfg.prompts, columns=min(10, len(drawn.images)))
            told = in_common(drawn.told)
            del told["model"], told["model_hash"]  # of the teacher: the student has none yet
            save_png(sheet, run / "samples" / f"{step:07d}.png", told)

        def validate(step: int, networks: dict) -> dict[str, float]:
            return objective.validation(*paths.unseen) if cfg.held_out else {}

        trainer = Trainer(
            cfg.trainer, objective, data, resolved_config=cfg, on_sample=on_sample, validate=validate
        )
        pipe.vae.to(trainer.device)
        trainer.fit()
    return run


if __name__ == "__main__":
    main()
