"""How many pictures go into a network call: what the device's memory takes, by a call gone through without data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusionfm.trace import Trace

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

SHARE = 0.5  # of the free memory: other processes want some, and kernels have scratch space of their own
TOKENS = 512
MOST = {"cpu": 8, "mps": 8, "cuda": 64}


def batch_size(device: torch.device, needs: int, sharing: int = 1) -> int:
    """Pictures for one network call on a device, 1 to MOST of its kind, when one needs that many bytes.

    sharing: processes that draw there at a time."""
    return max(1, min(MOST.get(device.type, 8), int(SHARE * free_bytes(device)) // (needs * sharing)))


def picture_bytes(pipe: DiffusionFMPipeline, width: int, height: int, copies: int) -> int:
    """Bytes that one more picture of a call holds at its peak, in the denoiser, `copies` times, or in the decoder."""
    scale, channels = pipe.scale(height, width), pipe.vae.latent_channels
    unit, larger = pipe.vae.downsample * scale, {} if scale == 1 else {"scale": scale}
    tokens = min(TOKENS, pipe.tokenizer.model_max_length)  # some tokenizers say 10**30
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), torch.device(pipe.device):
        x = torch.empty(1, channels, height // unit, width // unit)
        with Trace() as decoding:
            pipe.vae.decode(x.to(pipe.vae.dtype), **larger)
        dtype = pipe.transformer.dtype
        text = torch.empty(copies, tokens, pipe.text_encoder.config.hidden_size, dtype=dtype)
        mask = torch.ones(copies, tokens, dtype=torch.bool)
        with Trace() as drawing:
            pipe.transformer(x.to(dtype).repeat(copies, 1, 1, 1), torch.empty(copies), text, mask)
    return max(decoding.peak, drawing.peak)


def free_bytes(device: torch.device) -> int:
    """Memory that the device has free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    told = Path("/proc/meminfo")
    if told.exists():
        line = next(line for line in told.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return 4 * 2**30  # no way to ask: a modest machine
