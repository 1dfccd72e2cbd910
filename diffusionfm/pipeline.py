"""The pipeline as diffusers knows it: loaded from a folder, saved to one, adapted; `drawing.Painter` is what draws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusionfm.checks import COMPONENTS, DEFAULTS, base_hash, check_model, read_json, write_checksums
from diffusionfm.devices import default_dtype, parse_dtype
from diffusionfm.drawing import Cancelled, Painter
from diffusionfm.encoders import load_text_encoder, load_tokenizer, load_vae, load_whole
from diffusionfm.images import write_atomic
from diffusionfm.vocabulary import FILE

__all__ = ["Cancelled", "DiffusionFMPipeline", "build_pipeline"]


class DiffusionFMPipeline(DiffusionPipeline, Painter):
    """Text to transparent pictures: a `Painter` that loads, saves, moves and adapts as diffusers' pipelines do."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, scheduler: Any):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        Painter.__init__(self, vae, text_encoder, tokenizer, transformer)
        self._base: str | None = None  # base_hash, once it was asked for

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        fast: bool = False,
    ) -> DiffusionFMPipeline:
        """Load a pipeline folder; None is the shipped model. Nothing is downloaded, unpickled or run from it.

        fast: with the folder's few-step adapter, whose steps, guidance and shift become the defaults.
        dtype: of the denoiser and text encoder, "float32", "bfloat16" or "auto" (see `default_dtype`).
        device: where to run, None the CPU. Raises ValueError, one line, for a folder that cannot be used.
        """
        folder = check_model(path)
        where = torch.device(device or "cpu")
        kind = parse_dtype(dtype) or default_dtype(where)
        index = read_json(folder / "model_index.json")
        with _quiet():
            parts = {name: _load(folder / name, name, index[name][1], kind) for name in COMPONENTS}
        pipe = cls(**parts)
        pipe.adopt(folder, fast)
        pipe.register_to_config(_name_or_path=str(folder))
        return pipe.to(where)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the folder that `from_pretrained` reads: safetensors, JSON and generation.json."""
        super().save_pretrained(path, **{**options, "safe_serialization": True})
        text = json.dumps(self.defaults, indent=2, sort_keys=True) + "\n"
        write_atomic(Path(path) / "generation.json", text.encode())
        if self.vocabulary is not None:
            write_atomic(Path(path) / FILE, "\n".join([*self.vocabulary.words, ""]).encode())
        if self.phrasebook is not None:
            for name, data in self.phrasebook.files().items():
                write_atomic(Path(path) / name, data)
        write_checksums(Path(path))

    def load_lora(self, source: str | os.PathLike[str], scale: float = 1.0, any_model: bool = False) -> str:
        """Add a LoRA or DoRA at `scale`: a PEFT folder (adapter_config.json, adapter_model.safetensors), or a
        .safetensors file in kohya's or ComfyUI's names. Returns what to know about it, mostly "".

        Several may be added. Raises ValueError when it is no such adapter, does not fit, or, unless `any_model`,
        tells that it was trained on another model.
        """
        from diffusionfm.lora import add_lora, check_base, check_lora

        path = Path(source)
        check_lora(path, scale)
        word = check_base(path, self.model_name, self.base_hash, any_model)
        name = add_lora(self.networks, path, scale, taken=set(self.loras))
        self.loras[name] = scale
        self.lora_sources[name] = path
        return word

    @property
    def networks(self) -> dict[str, Any]:
        """The networks that adapters are for."""
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    @property
    def base_hash(self) -> str:
        """`checks.base_hash` of the folder this was loaded from; "" for one in memory alone."""
        folder = Path(self.config.get("_name_or_path") or "")
        if self._base is None:
            self._base = base_hash(folder) if (folder / "model_index.json").is_file() else ""
        return self._base


# ------------------------------------------------------------------ building and loading


def build_pipeline(
    vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, defaults: dict[str, Any]
) -> DiffusionFMPipeline:
    """A pipeline around networks in memory; `defaults` are the keys of generation.json."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    defaults = {**DEFAULTS, **defaults}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=defaults["shift"])
    pipe = DiffusionFMPipeline(vae, text_encoder, tokenizer, transformer, scheduler)
    pipe.defaults = defaults
    return pipe


def _load(folder: Path, name: str, class_name: str, dtype: torch.dtype) -> Any:
    """One component, every weight from the file: a missing or surplus one is an error, never random."""
    if name == "vae":
        return load_vae(folder)
    if name == "text_encoder":
        return load_text_encoder(folder, dtype)
    if name == "tokenizer":
        return load_tokenizer(folder)
    if name == "scheduler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    if class_name == "DiffusionUNet":
        from diffusionfm.unet import DiffusionUNet

        return load_whole(DiffusionUNet, folder, torch_dtype=dtype)
    from diffusionfm.transformer import DiffusionTransformer

    return load_whole(DiffusionTransformer, folder, torch_dtype=dtype)


class _quiet:
    """Hold back the libraries' loading bars and notes for a while."""

    def __enter__(self) -> None:
        self.levels = transformers_logging.get_verbosity(), diffusers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        diffusers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.levels[0])
        diffusers_logging.set_verbosity(self.levels[1])
        if self.bars:
            transformers_logging.enable_progress_bar()
