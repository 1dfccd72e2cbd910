"""Your pictures: an adapter or a whole model trained from a loaded pipeline, watched, reported and exported."""

from diffusionfm.finetune.run import check, configure, finetune, run
from diffusionfm.finetune.settings import RECORD, FinetuneConfig, load_preset, scale_preset_lr

__all__ = [
    "RECORD",
    "FinetuneConfig",
    "check",
    "configure",
    "finetune",
    "load_preset",
    "run",
    "scale_preset_lr",
]
