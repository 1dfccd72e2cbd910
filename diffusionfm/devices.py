"""Where to run and in what precision: devices and dtypes by name, chosen in this one place."""

from __future__ import annotations

import os

import torch

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype from its name; None for "auto"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    return DTYPES[dtype]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native to the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float32 elsewhere: on a CPU pictures then agree whatever the batch."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps; ValueError if absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(kind):
        raise ValueError(f"no device {name!r} here: use {', '.join(k for k, v in found.items() if v)}")
    return torch.device(name)


def rank_device(name: str = "auto") -> torch.device:
    """As `pick_device`; of several GPUs, where none is numbered, the one of this process's LOCAL_RANK."""
    device = pick_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
