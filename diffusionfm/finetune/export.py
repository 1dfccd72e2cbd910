"""What a run left, and a LoRA taken elsewhere, merged into a model or as one file of kohya's: checked by drawing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusionfm import lora
from diffusionfm.checkpoint import replace_folder, write_weights, writing
from diffusionfm.checks import check_model
from diffusionfm.pipeline import DiffusionFMPipeline

FORMS = ("merged", "kohya")
PROMPT, STEPS = "a red apple", 4  # what every export draws once more
TOLERANCE = 1  # of 255


def export(
    run: str | os.PathLike,
    out: str | os.PathLike,
    form: str = "merged",
    *,
    model: str | os.PathLike | None = None,
    scale: float = 1.0,
) -> int:
    """Write the LoRA of `run` as `form` at `out`; returns by how much, of 255, its picture differs from the LoRA's.

    merged: a pipeline folder, the adapter at `scale` added into the weights of `model` (None: the shipped one).
    kohya: one .safetensors file that kohya's tools, ComfyUI and `--lora` read. The export is loaded back
    and draws before it takes its place. ValueError for a run of another model, an `out` that exists, and
    an export that draws another picture.
    """
    source, target = Path(run), Path(out)
    if form not in FORMS:
        raise ValueError(f"an export is {' or '.join(FORMS)}, not {form!r}")
    lora.check_lora(source, scale)
    if source.is_file() and form == "kohya":
        raise ValueError(f"{source} is such a file already: load it with --lora")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another --out")
    if form == "kohya" and (target.suffix != ".safetensors" or scale != 1.0):
        raise ValueError(f"a kohya file is NAME.safetensors and has no scale of its own, got {target}")
    folder = check_model(model)
    pipe = DiffusionFMPipeline.from_pretrained(folder, dtype="float32")
    pipe.load_lora(source, scale)
    expected = _picture(pipe)
    with writing(target), _aside(target) as aside:
        if form == "merged":
            merge(pipe)
            pipe.save_pretrained(aside)
            again = DiffusionFMPipeline.from_pretrained(aside, dtype="float32")
        else:
            write_weights(aside, lora.as_kohya(lora.read_folder(source)), lora.kohya_metadata(source))
            again = DiffusionFMPipeline.from_pretrained(folder, dtype="float32")
            again.load_lora(aside)
        difference = _difference(again, expected)
        if difference > TOLERANCE:
            raise ValueError(
                f"the export draws another picture (by {difference} of 255): nothing was written"
            )
        if aside.is_dir():
            replace_folder(aside, target)
        else:
            os.replace(aside, target)
    return difference


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """The same name in a folder of its own beside the target, which goes again with what is left in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as made:
        yield Path(made) / target.name


def load_back(out: Path, pipe: DiffusionFMPipeline, model: str | os.PathLike | None, whole: bool) -> int:
    """By how much, of 255, what a run left at `out` draws another picture than the trained `pipe`.

    It is loaded anew: a LoRA into `model` (None: the shipped one), or, `whole`, as a model itself. ValueError where
    the pictures are not the same."""
    again = DiffusionFMPipeline.from_pretrained(out if whole else model, dtype="float32", device=pipe.device)
    if not whole:
        again.load_lora(out)
    difference = _difference(again, _picture(pipe))
    if difference > TOLERANCE:
        raise ValueError(
            f"{out} does not draw, loaded back, what was trained (it differs by {difference} of 255): run the same "
            "command again, which writes it anew"
        )
    return difference


def merge(pipe: DiffusionFMPipeline) -> None:
    """Add the pipeline's adapters into its weights and take them off: the same pictures from plain layers."""
    for network in (pipe.transformer, pipe.text_encoder):
        for name, layer in [*network.named_modules()]:
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                parent = network.get_submodule(name.rpartition(".")[0])
                base = layer.get_base_layer()
                assert isinstance(base, nn.Module)
                setattr(parent, name.rpartition(".")[2], base)
        if hasattr(network, "peft_config"):
            del network.peft_config
    pipe.loras.clear()
    pipe.phrasebook = None  # it does not list what the adapters were taught


def _difference(pipe: DiffusionFMPipeline, expected: np.ndarray) -> int:
    return int(np.abs(_picture(pipe) - expected).max())


def _picture(pipe: DiffusionFMPipeline) -> np.ndarray:
    """One picture as int (y, x, 4), premultiplied: hidden colours do not count."""
    drawn = pipe(PROMPT, seed=0, num_inference_steps=STEPS).images[0]
    return np.asarray(drawn.convert("RGBa")).astype(int)
