"""LoRA adapters on a denoiser: read a PEFT folder, check it against the model, add it at a strength."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_safetensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_lora(network: Any, folder: Path, scale: float, taken: set[str]) -> str:
    """Inject the adapter of `folder` into `network` at `scale`, beside those `taken`; returns its name."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch import nn

    check_lora(folder, scale)
    settings = read_json(folder / CONFIG)
    settings = {key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__}
    name = folder.resolve().name.replace(".", "_")
    while name in taken:
        name += "_"
    weights = load_file(folder / WEIGHTS)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    for key, value in weights.items():
        base, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        shape = shapes.get(f"{base}.weight") or shapes.get(f"{base}.base_layer.weight")
        side = {"A": 1, "B": 0}.get(kind[:1])
        if shape is None or (side is not None and value.shape[side] != shape[side]):
            raise ValueError(
                f"{folder} was made for another model ({key} does not fit): use the model it was trained on"
            )
    config = LoraConfig(**settings)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are meant
        inject_adapter_in_model(config, network, adapter_name=name)
    result: Any = set_peft_model_state_dict(network, weights, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder} does not fit this model ({result.unexpected_keys[0]}): use the model it was trained on"
        )
    nn.Module.to(network, device=network.device, dtype=network.dtype)  # diffusers' own warns of nothing here
    for module in network.modules():
        if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
            module.set_scale(name, scale)
            module.set_adapter([*taken, name], inference_mode=True)
    return name


def check_lora(folder: Path, scale: float = 1.0) -> None:
    """ValueError unless `folder` is a LoRA in PEFT's layout and `scale` from -4 to 4. Imports no torch."""
    if not math.isfinite(scale) or abs(scale) > 4:
        raise ValueError(f"a LoRA's scale must be from -4 to 4, got {scale}")
    if not folder.is_dir():
        raise ValueError(f"no LoRA folder at {folder}: pass a folder written by finetune")
    if read_json(folder / CONFIG).get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} is not of a LoRA: pass a folder written by finetune")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = (
            "adapter_model.bin is pickled and is never loaded: convert it to"
            if pickled
            else "the folder lacks"
        )
        raise ValueError(f"{folder}: {why} {WEIGHTS}")
    check_safetensors(folder / WEIGHTS)


def parse_lora(text: str) -> tuple[Path, float]:
    """ "DIR" or "DIR:scale" -> (DIR, scale), checked."""
    folder, scale = Path(text), 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not folder.is_dir():
        try:
            folder, scale = Path(head), float(tail)
        except ValueError as error:
            raise ValueError(f"--lora takes DIR or DIR:scale, got {text!r}") from error
    check_lora(folder, scale)
    return folder, scale
