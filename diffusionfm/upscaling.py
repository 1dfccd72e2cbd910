"""Larger pictures than the autoencoder was trained on: what its upscaler is taught, and how it is judged.

Axes: b batch, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusionfm.autoencoder import AutoencoderKL, Upscaler, premultiply, shrunk
from diffusionfm.formats import resized
from diffusionfm.objectives import as_float, composite, gradient_error, psnr, reconstruction_metrics


class Upscaling(nn.Module):
    """Train an autoencoder's upscaler, and nothing else, to give back a picture four times as large as was encoded.

    loss = L1(premultiplied RGBA) + background * L1(RGB laid over one random colour a picture)
         + gradient * L1(finite differences of the premultiplied error).
    crop: pixels a side, of the smaller picture, of the window in which a step compares; a multiple of 2, 0 for all.
    """

    def __init__(self, vae: AutoencoderKL, background: float = 0.5, gradient: float = 1.0, crop: int = 64):
        super().__init__()
        if vae.upscaler is None:
            raise ValueError("the autoencoder has no upscaler: build it with upscaler_widths=(28, 20)")
        self.vae, self.background, self.gradient, self.crop = vae, background, gradient, crop
        vae.requires_grad_(False)
        vae.upscaler.requires_grad_(True)

    def networks(self) -> dict[str, nn.Module]:
        """The network to train and save."""
        return {"vae": self.vae}

    def compile_networks(self) -> None:
        """Compile the upscaler: the rest only shows it what to start from."""
        assert self.vae.upscaler is not None
        self.vae.upscaler.compile()

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch["picture"]: straight RGBA (b, 4, 4y, 4x), float in [0, 1] or uint8. Gives loss, metrics."""
        picture = as_float(batch["picture"])
        with torch.no_grad():
            mean, _ = self.vae.encode_moments(shrunk(picture, Upscaler.factor))
            features, small = self.vae.features(mean)
        target, features, small = self._window(premultiply(picture), features, small)
        output = self.vae.decode_raw_large(features, small)

        difference = output - target
        color = torch.rand(len(picture), 3, 1, 1, device=picture.device)
        pixel = difference.abs().mean()
        laid = (difference[:, :3] - difference[:, 3:] * color).abs().mean()
        edges = gradient_error(difference, scales=1)
        loss = pixel + self.background * laid + self.gradient * edges
        metrics = {"l1": pixel.detach(), "gradient": edges.detach()}
        return loss, metrics | reconstruction_metrics(output.detach(), target)

    def _window(self, target: Tensor, features: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same window of all three, anywhere."""
        side = self.crop // 2
        if not side or side >= min(features.shape[-2:]):
            return target, features, small
        top, left = (int(torch.randint(size - side + 1, ())) for size in features.shape[-2:])

        def cut(x: Tensor, scale: int) -> Tensor:
            return x[..., scale * top : scale * (top + side), scale * left : scale * (left + side)]

        return cut(target, 2 * Upscaler.factor), cut(features, 1), cut(small, 2)


@torch.no_grad()
def upscaling_report(
    vae: AutoencoderKL, pictures: Iterable[tuple[str, Tensor]], scale: int = Upscaler.factor
) -> dict[str, dict[str, float]]:
    """Judge the upscaler on labelled pictures beside Lanczos of the picture that the autoencoder gives without it.

    pictures: (source, straight RGBA (4, 4y, 4x), float in [0, 1] or uint8) pairs, true renders; scale: 2 or 4, that of
    the pictures to judge, of which the true ones are then the mean over pixels.
    Returns source -> means over its pictures, and "all": "psnr_white", "psnr_black", "alpha_error" and "edge_error",
    the mean absolute error of finite differences in premultiplied RGBA; each also with "lanczos_" before it; and
    "better", the share of pictures with a smaller edge error than Lanczos.
    """
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for source, picture in pictures:
        whole = as_float(picture[None].to(vae.device))
        latent = vae.encode(shrunk(whole, Upscaler.factor))
        true = whole if scale == Upscaler.factor else shrunk(whole, Upscaler.factor // scale)
        ours = _errors(vae.decode(latent, scale=scale), true)
        theirs = _errors(lanczos(vae.decode(latent), scale), true)
        row = {**ours, **{f"lanczos_{name}": value for name, value in theirs.items()}}
        row["better"] = float(ours["edge_error"] < theirs["edge_error"])
        rows[source].append(row)
        rows["all"].append(row)
    return {
        source: {
            "pictures": len(kept),
            **{name: sum(row[name] for row in kept) / len(kept) for name in kept[0]},
        }
        for source, kept in rows.items()
    }


def lanczos(picture: Tensor, factor: int = Upscaler.factor) -> Tensor:
    """Straight RGBA (b, 4, y, x) in [0, 1], enlarged as `batch --size` does where no upscaler is at hand."""
    arrays = (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    side = factor * max(picture.shape[-2:])
    larger = [np.asarray(resized(Image.fromarray(array, "RGBA"), side)) for array in arrays]
    return torch.from_numpy(np.stack(larger)).permute(0, 3, 1, 2).to(picture) / 255


def _errors(picture: Tensor, true: Tensor) -> dict[str, float]:
    seen, target = premultiply(picture.float()), premultiply(true)
    return {
        "psnr_white": psnr(composite(seen, 1.0), composite(target, 1.0)).item(),
        "psnr_black": psnr(seen[:, :3], target[:, :3]).item(),
        "alpha_error": (seen[:, 3] - target[:, 3]).abs().mean().item(),
        "edge_error": gradient_error(seen - target, scales=1).item(),
    }
