"""What may be asked for and what may be loaded: limits of a request and of a model folder. Imports no torch.

Every check runs before any work and raises ValueError, one line with the fix in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from diffusionfm.images import write_atomic

STEPS = (1, 500)
GUIDANCE = (0.0, 50.0)
STRENGTH = (0.01, 1.0)
SIZE = (32, 2048)  # a picture of 1,024 x 1,024 pixels' area may be twice as long
SIZE_MULTIPLE = 16
SEED = (0, 2**63 - 1)
IMAGES = (1, 1000)
PROMPT_LENGTH = 10_000

SHIPPED = Path(__file__).parent / "weights" / "icons"
DEFAULTS: dict[str, Any] = {"steps": 25, "guidance": 4.0, "height": 128, "width": 128, "shift": 1.0}

# model_type of a text encoder's config.json -> its class in transformers; of an encoder-decoder, the encoder half.
TEXT_MODELS = {
    "bert": "BertModel",
    "clip_text_model": "CLIPTextModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
    "llama": "LlamaModel",
    "modernbert": "ModernBertModel",
    "mt5": "MT5EncoderModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "xlm-roberta": "XLMRobertaModel",
}

# The only classes a model folder may name: the folder is data, it does not choose what code runs.
COMPONENTS: dict[str, set[tuple[str, str]]] = {
    "vae": {
        ("diffusionfm.autoencoder", "AutoencoderKL"),
        ("diffusionfm.encoders", "PhotoAutoencoderKL"),
        ("diffusionfm.encoders", "PhotoAutoencoderDC"),
    },
    "text_encoder": {("transformers", name) for name in TEXT_MODELS.values()},
    "tokenizer": {("transformers", "PreTrainedTokenizerFast"), ("transformers", "TokenizersBackend")},
    "transformer": {
        ("diffusionfm.transformer", "DiffusionTransformer"),
        ("diffusionfm.unet", "DiffusionUNet"),
    },
    "scheduler": {("diffusers", "FlowMatchEulerDiscreteScheduler")},
}
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CHECKSUMS = "checksums.json"
OTHER_FILES = {"tokenizer": "tokenizer.json", "scheduler": "scheduler_config.json"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


# ------------------------------------------------------------------ a request


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return value


def check_seed(seed: Any, images: int = 1) -> int:
    """A seed whose `images` successors are valid too: picture k of a prompt uses seed + k."""
    return _whole("seed", seed, SEED[0], SEED[1] - images + 1)


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """A prompt that says something; a negative prompt may be empty."""
    if not isinstance(prompt, str):
        raise ValueError(f"{name} must be text, got {type(prompt).__name__}")
    if name == "prompt" and not prompt.strip():
        raise ValueError("the prompt is empty: say what to draw")
    if len(prompt) > PROMPT_LENGTH:
        raise ValueError(f"{name} has {len(prompt):,} characters: shorten it to {PROMPT_LENGTH:,} or fewer")
    if "\0" in prompt:
        raise ValueError(f"{name} holds a NUL character, which no text has: remove it")
    if not is_unicode(prompt):
        raise ValueError(f"{name} is not valid Unicode (a lone surrogate): save the text as UTF-8")
    return prompt


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def check_settings(
    *,
    steps: Any = None,
    guidance: Any = None,
    height: Any = None,
    width: Any = None,
    num_images: Any = None,
    strength: Any = None,
) -> None:
    """Check the settings that are not None: steps, guidance, size, the number of pictures and strength."""
    if steps is not None:
        _whole("steps", steps, *STEPS)
    if num_images is not None:
        _whole("the number of images", num_images, *IMAGES)
    if guidance is not None:
        number = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)
        if not number or not math.isfinite(guidance) or not GUIDANCE[0] <= guidance <= GUIDANCE[1]:
            raise ValueError(f"guidance must be a number from 0 to 50, got {guidance!r}")
    if strength is not None:
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not number or not STRENGTH[0] <= strength <= STRENGTH[1]:
            raise ValueError(
                f"strength must be a number from {STRENGTH[0]} to {STRENGTH[1]:g}, got {strength!r}"
            )
    for name, value in (("height", height), ("width", width)):
        if value is None:
            continue
        _whole(name, value, *SIZE)
        if value % SIZE_MULTIPLE:
            near = max(SIZE[0], round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise ValueError(f"{name} must be a multiple of {SIZE_MULTIPLE}, got {value}: try {near}")


# ------------------------------------------------------------------ a model folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file, or ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: point --model at a folder written by save_pretrained")
    if path.stat().st_size > 2**20:
        raise ValueError(f"{path} is over 1 MiB: this is not a settings file of a model folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy the model folder again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: copy the model folder again")
    return value


def read_defaults(folder: Path) -> dict[str, Any]:
    """generation.json: {steps, guidance, height, width, shift}; a missing file or key takes DEFAULTS."""
    path = folder / "generation.json"
    return check_defaults(path, read_json(path) if path.exists() else {})


def check_defaults(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the file at `path` tells of how to draw, over DEFAULTS; ValueError for unknown keys and bad values."""
    unknown = sorted(set(found) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}, the keys are {', '.join(DEFAULTS)}")
    defaults = DEFAULTS | found
    check_settings(**{key: defaults[key] for key in ("steps", "guidance", "height", "width")})
    shift = defaults["shift"]
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0.01 <= shift <= 100:
        raise ValueError(f"{path}: shift must be a number from 0.01 to 100, got {shift!r}")
    return defaults


def check_model(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a pipeline that is safe and complete enough to load; None is the shipped model.

    Raises ValueError when the folder, a file or a weight is missing, when weights are pickled, cut short
    or of a class outside COMPONENTS. Nothing is downloaded and nothing from the folder is run.
    """
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        if path is None:
            raise ValueError(
                f"the shipped model is missing at {folder}: install the package again, or pass --model DIR"
            )
        raise ValueError(
            f"no model folder at {folder}: pass a folder written by save_pretrained (nothing is downloaded)"
        )
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "DiffusionFMPipeline":
        raise ValueError(
            f"{folder}/model_index.json is for {index.get('_class_name')!r}: not DiffusionFMPipeline"
        )
    named = {key for key in index if not key.startswith("_")}
    if named != set(COMPONENTS):
        odd = sorted(named ^ set(COMPONENTS))[0]
        raise ValueError(
            f"{folder}/model_index.json: component {odd!r} is {'unknown' if odd in named else 'missing'}; "
            f"a model has {', '.join(COMPONENTS)}"
        )
    for name, allowed in COMPONENTS.items():
        entry = index[name]
        if (
            not isinstance(entry, list)
            or not all(isinstance(part, str) for part in entry)
            or tuple(entry) not in allowed
        ):
            good = " or ".join(sorted(".".join(pair) for pair in allowed))
            raise ValueError(
                f"{folder}/model_index.json: {name} is {entry!r}, which is not allowed: it must be {good}"
            )
        _check_component(folder / name, name)
    read_defaults(folder)
    return folder


def base_hash(folder: Path) -> str:
    """12 hex digits of the SHA-256 over the weights in a model folder, as float32: which model an adapter is for.

    The same in any precision. An upscaler does not count: what is adapted to a model fits it with any and with none."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for name, file in WEIGHTS.items():
        with safe_open(folder / name / file, framework="pt") as tensors:
            for key in sorted(key for key in tensors.keys() if not key.startswith("upscaler.")):  # noqa: SIM118
                digest.update(f"{name}.{key}".encode())
                value = tensors.get_tensor(key).to(torch.float32).reshape(-1)
                digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _check_component(folder: Path, name: str) -> None:
    if name in OTHER_FILES:
        read_json_file = folder / OTHER_FILES[name]
        if not read_json_file.is_file():
            raise ValueError(f"{read_json_file} is missing: copy the model folder again")
        return
    refuse_code(folder / "config.json", read_json(folder / "config.json"))
    weights = folder / WEIGHTS[name]
    if not weights.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise ValueError(
                f"{folder / pickled[0]} is pickled and never loaded: convert it to {weights.name}"
            )
        raise ValueError(
            f"{weights} is missing: copy the model folder again, or write it with save_pretrained"
        )
    check_safetensors(weights)


def write_checksums(folder: Path) -> None:
    """checksums.json beside a model's weights: the SHA-256 of each file, so that a damaged copy is seen."""
    found = {file: _sha256(folder / file) for file in (f"{name}/{file}" for name, file in WEIGHTS.items())}
    write_atomic(folder / CHECKSUMS, (json.dumps(found, indent=2) + "\n").encode())


def check_checksums(folder: Path) -> None:
    """ValueError for weights that are not those checksums.json tells of; a folder without one is not checked."""
    if not (folder / CHECKSUMS).exists():
        return
    for file, digest in read_json(folder / CHECKSUMS).items():
        if file not in {f"{name}/{file}" for name, file in WEIGHTS.items()}:
            raise ValueError(f"{folder / CHECKSUMS} names {file!r}, which is no weights file of a model")
        if _sha256(folder / file) != digest:
            raise ValueError(
                f"{folder / file} is not the file that was saved: copy it again, or if you changed it on purpose "
                f"remove {CHECKSUMS}"
            )


def told_checksum(folder: Path, name: str) -> str:
    """The SHA-256 that checksums.json tells of a network's weights; "" in a folder without one."""
    file = folder / CHECKSUMS
    return str(read_json(file).get(f"{name}/{WEIGHTS[name]}", "")) if file.exists() else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_code(path: Path, config: Any) -> None:
    """ValueError for settings of a network, at any depth, that make a library fetch or run code.

    Among them an attention implementation: its name may be that of a repository to download a kernel from.
    """
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        kernel = "attn_implementation" in str(key) and value not in (None, "eager", "sdpa")
        if kernel or key in ("auto_map", "trust_remote_code", "custom_pipelines"):
            raise ValueError(f"{path} asks for remote code ({key}), which never runs: remove that key")
        if isinstance(value, dict | list):
            refuse_code(path, value)


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; ValueError when the file is cut short or is none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100 * 2**20):
            raise ValueError(f"{path} is not a safetensors file or is cut short: copy it again")
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged safetensors header: copy it again") from error
    if size != 8 + length + end:
        raise ValueError(
            f"{path} is {size:,} bytes long where its header says {8 + length + end:,}: copy it again"
        )
    return header
