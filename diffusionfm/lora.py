"""LoRA adapters on a pipeline: read a PEFT folder or a file with kohya's or ComfyUI's names, check it, add it."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusionfm.checks import PICKLES, check_defaults, check_safetensors, read_json, told_checksum

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_NAME, BASE_HASH = "base_model_name_or_path", "revision"  # in CONFIG, the model it was trained on
KOHYA_NAME, KOHYA_HASH = "ss_sd_model_name", "ss_new_sd_model_hash"  # in a file's metadata, the same
PEFT = "base_model.model."
FEW_STEP = "few_step"  # of a pipeline folder: an adapter that draws in few steps, and its generation.json
# Of a single file: what a tensor's name begins with, by the network it is for. Kohya writes _ for every dot.
PREFIXES = {
    "transformer": ("lora_unet_", "diffusion_model.", "transformer."),
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder."),
}
# ... and ends with, in PEFT's words.
SUFFIXES = {
    ".lora_down.weight": ".lora_A.weight",
    ".lora_up.weight": ".lora_B.weight",
    ".lora_A.weight": ".lora_A.weight",
    ".lora_B.weight": ".lora_B.weight",
    ".dora_scale": ".lora_magnitude_vector",
    ".alpha": ".alpha",
}
Adapter = tuple[dict[str, Any], dict[str, Any]]  # settings as of adapter_config.json, tensors by PEFT's names


def add_lora(networks: Mapping[str, Any], source: Path, scale: float, taken: set[str], name: str = "") -> str:
    """Inject the adapter at `source` into the networks it is for, at `scale`, beside those `taken`; returns its name.

    networks: the pipeline's "transformer" and "text_encoder". name: that of the file or folder unless given."""
    check_lora(source, scale)
    name = (name or (source.stem if source.is_file() else source.resolve().name)).replace(".", "_")
    while name in taken:
        name += "_"
    adapters = _read_file(source, networks) if source.is_file() else read_folder(source)
    for part, (settings, weights) in adapters.items():
        _check_fit(networks[part], source, weights)
        _inject(networks[part], source, name, settings, weights)
        _set_strength(networks[part], name, scale, taken)
    return name


def check_base(source: Path, model: str, weights: str, any_model: bool = False) -> str:
    """What to know about an adapter beside the model `model` with the hash `weights`; "" when it was trained on it.

    ValueError when it was trained on another model, which its shapes do not always tell; a word about that instead
    with `any_model`. Adapters of other tools seldom say what they were trained on: a word about that, too."""
    name, told = base_of(source)
    if told == weights or (told and not weights):  # weights in memory have no hash
        return ""
    if not told:
        return f"{source} does not tell which model it was trained on: its shapes fit this one, {model!r}"
    said = f"{source} was trained on another model, {name!r} ({told}), than this one, {model!r} ({weights})"
    if any_model:
        return f"{said}: pictures may suffer"
    raise ValueError(f"{said}: name that one with --model, or add the LoRA all the same with --lora-any")


def base_of(source: Path) -> tuple[str, str]:
    """(name, hash) of the model that an adapter was trained on, as it tells them; "" for what it does not tell."""
    if source.is_file():
        told, keys = check_safetensors(source).get("__metadata__", {}), (KOHYA_NAME, KOHYA_HASH)
    else:
        told, keys = read_json(source / CONFIG), (BASE_NAME, BASE_HASH)
    name, found = (str(told.get(key) or "") for key in keys)
    return name, found if re.fullmatch("[0-9a-f]{12}", found) else ""  # others put a branch or a commit there


def _check_fit(network: Any, source: Path, weights: dict[str, Any]) -> None:
    """ValueError unless every matrix is as wide and as high as the layer it belongs to."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    for key, value in weights.items():
        base, _, kind = key.removeprefix(PEFT).partition(".lora_")
        shape = shapes.get(f"{base}.weight") or shapes.get(f"{base}.base_layer.weight")
        side = {"A": 1, "B": 0}.get(kind[:1])
        if shape is None or (side is not None and value.shape[side] != shape[side]):
            raise ValueError(
                f"{source} was made for another model ({key} does not fit): use the model it was trained on"
            )


def _inject(network: Any, source: Path, name: str, settings: dict[str, Any], weights: dict[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from torch import nn

    config = LoraConfig(**{k: v for k, v in settings.items() if k in LoraConfig.__dataclass_fields__})
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are meant
        inject_adapter_in_model(config, network, adapter_name=name)
    result: Any = set_peft_model_state_dict(network, weights, adapter_name=name)
    own = [
        key.partition(".lora_")[2] for key in result.missing_keys
    ]  # a layer may be called as the adapter is
    missing = [
        key for key, end in zip(result.missing_keys, own, strict=True) if end.split(".")[1:2] == [name]
    ]
    wrong = [*result.unexpected_keys, *missing]
    if wrong:
        raise ValueError(f"{source} does not fit this model ({wrong[0]}): use the model it was trained on")
    nn.Module.to(network, device=network.device, dtype=network.dtype)  # diffusers' own warns of nothing here


def _set_strength(network: Any, name: str, scale: float, taken: set[str]) -> None:
    """Switch the adapter on beside the others, at `scale`; a DoRA's magnitudes go as far from the layer's own."""
    for module in network.modules():
        if not hasattr(module, "set_scale") or name not in getattr(module, "scaling", {}):
            continue
        module.set_scale(name, scale)
        module.set_adapter([*taken, name], inference_mode=True)
        if name in getattr(module, "lora_magnitude_vector", {}):
            magnitude = module.lora_magnitude_vector[name].weight
            own = module.get_base_layer().weight.detach().norm(dim=1).to(magnitude.dtype)
            magnitude.data = own + scale * (magnitude.detach() - own)


def merge_few_step(network: Any, folder: Path, model: Path | None = None) -> dict[str, Any]:
    """Add a pipeline folder's few-step adapter to its denoiser's weights; returns the settings it draws at.

    model: the pipeline folder that the denoiser is of, where that is another. ValueError where the folder has no
    adapter, or one that was distilled from another denoiser."""
    import torch

    source = folder / FEW_STEP
    if not source.is_dir():
        raise ValueError(
            f"{folder} has no {FEW_STEP} adapter: draw without --fast, or make one with train/distill.py"
        )
    check_lora(source)
    drawn_at = read_json(source / "generation.json")
    teacher, own = drawn_at.pop("teacher", ""), told_checksum(model or folder, "transformer")
    if teacher and own and teacher != own:
        raise ValueError(
            f"{source} was distilled from another denoiser than that of {model or folder}, or another copy of it: "
            "draw without --fast, or make one of this model with train/paths.py and train/distill.py"
        )
    check_defaults(source / "generation.json", drawn_at)
    settings, weights = read_folder(source)["transformer"]
    _check_fit(network, source, weights)
    layers = dict(network.named_modules())
    scale = settings["lora_alpha"] / settings["r"]
    with torch.no_grad():
        for key, down in weights.items():
            layer, _, kind = key.removeprefix(PEFT).partition(".lora_")
            if kind.startswith("A"):
                up = weights[key.replace(".lora_A.", ".lora_B.")]
                weight = layers[layer].weight
                weight += (scale * up.float() @ down.float()).to(weight)
    return drawn_at


# ---- what is on disk -----------------------------------------------------------------------------------------


def read_folder(folder: Path) -> dict[str, Adapter]:
    """A PEFT folder, with the text encoder's adapter in a folder inside where it has one."""
    from safetensors.torch import load_file

    places = {"transformer": folder, "text_encoder": folder / "text_encoder"}
    return {
        part: (read_json(place / CONFIG), load_file(place / WEIGHTS))
        for part, place in places.items()
        if part == "transformer" or (place / CONFIG).is_file()
    }


def _read_file(file: Path, networks: Mapping[str, Any]) -> dict[str, Adapter]:
    """A single file in kohya's, ComfyUI's or diffusers' names."""
    from safetensors.torch import load_file

    layers = {part: _layers(network) for part, network in networks.items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}  # network -> layer -> what -> tensor
    for key, value in load_file(file).items():
        part, layer, what = _place(key, layers)
        if not what:
            raise ValueError(
                f"{file} was made for another model ({key} is no layer of it): use the model it was trained on"
            )
        found.setdefault(part, {}).setdefault(layer, {})[what] = value
    if not found:
        raise ValueError(f"{file} holds no adapter: pass a file that `export --to kohya` wrote")
    return {part: _as_peft(file, held) for part, held in found.items()}


def _layers(network: Any) -> dict[str, str]:
    """Names of the linear layers as files may write them -> their own."""
    own = {
        key.removesuffix(".weight").removesuffix(".base_layer")
        for key, value in network.state_dict().items()
        if key.endswith(".weight") and ".lora_" not in key and value.ndim == 2
    }
    return {name.replace(".", "_"): name for name in own} | {name: name for name in own}


def _place(key: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str]:
    """(network, layer, what in PEFT's words) of a tensor's name; empty strings for one that belongs nowhere."""
    suffix = next((end for end in SUFFIXES if key.endswith(end)), None)
    if suffix is not None:
        for part, prefixes in PREFIXES.items():
            for prefix in prefixes:
                name = key.removeprefix(prefix).removesuffix(suffix)
                if key.startswith(prefix) and name in layers.get(part, {}):
                    return part, layers[part][name], SUFFIXES[suffix]
    return "", "", ""


def _as_peft(file: Path, held: dict[str, dict[str, Any]]) -> Adapter:
    """Settings and tensors of one network's adapter; the commonest rank and alpha are the rule, others patterns."""
    lacking = [
        layer for layer, parts in held.items() if not {".lora_A.weight", ".lora_B.weight"} <= set(parts)
    ]
    if lacking:
        raise ValueError(f"{file} is not a whole LoRA ({lacking[0]} lacks a matrix): copy it again")
    ranks = {layer: parts[".lora_A.weight"].shape[0] for layer, parts in held.items()}
    alphas = {
        layer: float(parts[".alpha"]) if ".alpha" in parts else ranks[layer] for layer, parts in held.items()
    }
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(held),
        "rank_pattern": {re.escape(layer): r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(layer): a for layer, a in alphas.items() if a != alpha},
        "use_dora": any(".lora_magnitude_vector" in parts for parts in held.values()),
    }
    weights = {
        f"{PEFT}{layer}{what}": value.reshape(-1) if what == ".lora_magnitude_vector" else value
        for layer, parts in held.items()
        for what, value in parts.items()
        if what != ".alpha"
    }
    return settings, weights


def kohya_metadata(source: Path) -> dict[str, str]:
    """What a file in kohya's names says of the model that a folder's adapter was trained on."""
    return dict(zip((KOHYA_NAME, KOHYA_HASH), base_of(source), strict=True))


def as_kohya(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The tensors of a file that kohya's tools and ComfyUI read, from adapters in PEFT's words."""
    import torch

    ends = {value: key for key, value in reversed(SUFFIXES.items())}
    tensors = {}
    for part, (settings, weights) in adapters.items():
        for key, value in weights.items():
            layer, _, kind = key.removeprefix(PEFT).partition(".lora_")
            name = PREFIXES[part][0] + layer.replace(".", "_")
            is_scale = kind == "magnitude_vector"
            tensors[name + ends[f".lora_{kind}"]] = value.reshape(-1, 1) if is_scale else value
            tensors[f"{name}.alpha"] = torch.tensor(float(settings["lora_alpha"]))
    return tensors


def check_lora(source: Path, scale: float = 1.0) -> None:
    """ValueError unless `source` is a LoRA, a PEFT folder or a file, and `scale` from -4 to 4. Imports no torch."""
    if not math.isfinite(scale) or abs(scale) > 4:
        raise ValueError(f"a LoRA's scale must be from -4 to 4, got {scale}")
    if source.is_file():
        if source.suffix in PICKLES:
            raise ValueError(f"{source} is pickled and is never loaded: convert it to safetensors")
        if source.suffix != ".safetensors":
            raise ValueError(
                f"{source} is no LoRA: pass a folder written by finetune, or a .safetensors file"
            )
        check_safetensors(source)
        return
    if not source.is_dir():
        raise ValueError(f"no LoRA folder at {source}: pass a folder written by finetune")
    places = [source, source / "text_encoder"]
    for folder in [place for place in places if place == source or (place / CONFIG).is_file()]:
        if not (folder / CONFIG).is_file() and (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is a whole model, not a LoRA: use it as --model {folder}")
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
    """ "DIR", "FILE.safetensors" or either with ":scale" -> (path, scale), checked."""
    source, scale = Path(text), 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not source.exists():
        try:
            source, scale = Path(head), float(tail)
        except ValueError as error:
            raise ValueError(f"--lora takes DIR or DIR:scale, got {text!r}") from error
    check_lora(source, scale)
    return source, scale
