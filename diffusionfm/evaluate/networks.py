"""The autoencoder and the denoiser on held-out pictures: what comes back, and the loss at fixed times.

Axes: b pictures, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffusionfm.evaluate.statistics import mean_of
from diffusionfm.objectives import FlowMatching, reconstruction_report

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

TIMES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
BATCH = 16


def stacked(pictures: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Straight RGBA (b, 4, y, x) in [0, 1] of pictures at a width and height."""
    fitted = [
        picture if picture.size == size else picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    pixels = np.stack([np.asarray(picture.convert("RGBA")) for picture in fitted])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def autoencoder_lines(vae: Any, pictures: torch.Tensor) -> dict[str, dict[str, Any]]:
    """PSNR on white and on black in dB, capped at 60 a picture, and mean alpha error, each with its interval."""
    report = reconstruction_report(vae, ((str(k), picture) for k, picture in enumerate(pictures)))
    rows = [report[str(k)] for k in range(len(pictures))]
    return {
        name: mean_of(np.array([row[name] for row in rows]))
        for name in ("psnr_white", "psnr_black", "alpha_error")
    }


@torch.inference_mode()
def loss_lines(
    pipe: DiffusionFMPipeline, pictures: torch.Tensor, captions: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Mean squared velocity error at each of TIMES, "loss_t0.1" and so on, and over all of them, "loss"."""
    objective = FlowMatching(pipe.transformer, pipe.text_encoder, pipe.tokenizer)
    generator = torch.Generator().manual_seed(0)
    errors: list[np.ndarray] = []
    dtype = pipe.transformer.dtype
    for start in range(0, len(pictures), BATCH):
        x0 = pipe.vae.encode(pictures[start : start + BATCH].to(pipe.device)).float()
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        text, mask = objective.read(list(captions[start : start + BATCH]))
        rows = []
        for time in TIMES:
            t = torch.full((len(x0),), time, device=x0.device)
            with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
                rows.append(objective.error(x0, noise, t, text, mask).float().cpu().numpy())
        errors.append(np.stack(rows))
    all_errors = np.concatenate(errors, axis=1)
    found = {f"loss_t{time:g}": mean_of(row) for time, row in zip(TIMES, all_errors, strict=True)}
    return {"loss": mean_of(all_errors.mean(0)), **found}
