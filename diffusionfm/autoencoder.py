"""The RGBA autoencoder: straight-alpha pictures to normalised latents and back, 8x down.

Axes: b batch, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusionfm.models import AutoencoderKL as AutoencoderKL

# Below half an 8-bit step alpha rounds to 0: such a pixel has no colour that anyone can see.
INVISIBLE = 0.5 / 255


def __getattr__(name: str) -> Any:
    if name == "AutoencoderKL":  # loads diffusers, which drawing does without
        from diffusionfm import models

        return models.AutoencoderKL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def premultiply(picture: Tensor) -> Tensor:
    """Straight-alpha RGBA (b, 4, y, x) in [0, 1] to premultiplied RGBA of the same shape and range."""
    color, alpha = picture[:, :3], picture[:, 3:]
    return torch.cat([color * alpha, alpha], dim=1)


def unpremultiply(picture: Tensor) -> Tensor:
    """Premultiplied RGBA (b, 4, y, x), any range, to straight RGBA in [0, 1], black where alpha is 0."""
    color, alpha = picture[:, :3].clamp(0, 1), picture[:, 3:].clamp(0, 1)
    alpha = torch.where(alpha < INVISIBLE, 0.0, alpha)
    color = torch.where(alpha > 0, color / alpha.clamp_min(INVISIBLE), 0.0).clamp(0, 1)
    return torch.cat([color, alpha], dim=1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over each pixel's channels: in channels_last on CPU far faster than RMS or group norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), both convolutions 3x3 at one width."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def blocks(channels: int, depth: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(depth)]


class PatchDiscriminator(nn.Module):
    """Tells real premultiplied RGBA (b, 4, y, x) from decoded, patch by patch: one score (b, 1, y/8, x/8) each.

    PatchGAN (Isola et al. 2017, arXiv:1611.07004), in the autoencoder's own blocks.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.score = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(4 * 16, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            ResidualBlock(2 * width),
            ChannelNorm(2 * width),
            nn.Conv2d(2 * width, 1, 1),
        )

    def forward(self, picture: Tensor) -> Tensor:
        return self.score((picture * 2 - 1).contiguous(memory_format=torch.channels_last))


class AutoencoderNetwork(nn.Module):
    """KL autoencoder of RGBA pictures (Rombach et al. 2022, arXiv:2112.10752), fully convolutional.

    Pictures are straight-alpha RGBA in [0, 1], (b, 4, y, x) with y and x divisible by 8; latents are (b,
    latent_channels, y/8, x/8) with mean 0 and standard deviation 1 once `set_latent_statistics` was called.
    Inside, a picture is premultiplied RGB and alpha, mapped to [-1, 1], so colour nobody sees costs nothing.

    latent_channels: channels of a latent.
    widths: channels at 1/2, 1/4 and 1/8 of the picture's size.
    encoder_depths: residual blocks at 1/4 and 1/8.
    decoder_depths: residual blocks at 1/2, 1/4 and 1/8.
    """

    downsample = 8
    channels = 4  # of a picture

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        latent_channels: int = 16,
        widths: Sequence[int] = (48, 96, 160),
        encoder_depths: Sequence[int] = (2, 1),
        decoder_depths: Sequence[int] = (1, 2, 2),
    ):
        super().__init__()
        self.latent_channels = latent_channels
        half, quarter, eighth = widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(4 * 16, quarter, 3, padding=1),
            *blocks(quarter, encoder_depths[0]),
            nn.Conv2d(quarter, eighth, 2, stride=2),
            *blocks(eighth, encoder_depths[1]),
            ChannelNorm(eighth),
            nn.Conv2d(eighth, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, eighth, 3, padding=1),
            *blocks(eighth, decoder_depths[2]),
            nn.Conv2d(eighth, 4 * quarter, 1),
            nn.PixelShuffle(2),
            *blocks(quarter, decoder_depths[1]),
            nn.Conv2d(quarter, 4 * half, 1),
            nn.PixelShuffle(2),
            *blocks(half, decoder_depths[0]),
            ChannelNorm(half),
            nn.SiLU(),
            nn.Conv2d(half, 4 * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        for module in self.modules():
            if isinstance(module, ResidualBlock):  # every block starts as the identity
                for parameter in module.conv2.parameters():
                    nn.init.zeros_(parameter)

    def encode_moments(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw latent, each (b, c, y/8, x/8), of straight RGBA in [0, 1].

        Raises ValueError unless the picture is (b, 4, y, x) with y and x divisible by 8.
        """
        if picture.ndim != 4 or picture.shape[1] != 4:
            raise ValueError(f"pictures must be RGBA, shape (b, 4, y, x); got {tuple(picture.shape)}")
        y, x = picture.shape[2:]
        if y % self.downsample or x % self.downsample:
            raise ValueError(f"height and width must be divisible by {self.downsample}: got {y} x {x}")
        inside = (premultiply(picture.float()) * 2 - 1).to(_dtype(self.encoder))
        moments = self.encoder(inside.contiguous(memory_format=torch.channels_last)).float()
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-20, 4)

    def encode(self, picture: Tensor) -> Tensor:
        """Normalised latents (b, c, y/8, x/8), the posterior's mean, of straight RGBA in [0, 1]."""
        mean, _ = self.encode_moments(picture)
        return (mean - self._channels(self.latent_mean)) / self._channels(self.latent_std)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Premultiplied RGBA (b, 4, y, x), unclamped, of a raw latent: what a loss compares."""
        latent = latent.to(_dtype(self.decoder)).contiguous(memory_format=torch.channels_last)
        return (self.decoder(latent).float() + 1) / 2

    def decode(self, latent: Tensor) -> Tensor:
        """Straight float32 RGBA (b, 4, y, x), clamped to [0, 1], of normalised latents (b, c, y/8, x/8)."""
        raw = latent.float() * self._channels(self.latent_std) + self._channels(self.latent_mean)
        return unpremultiply(self.decode_raw(raw))

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Keep the per-channel mean and standard deviation, each (c,), of raw latents over a training set."""
        shape = (self.latent_channels,)
        if mean.shape != shape or std.shape != shape or not bool((std > 0).all()):
            raise ValueError(f"latent statistics must be two tensors of shape {shape}, every std above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _channels(self, statistic: Tensor) -> Tensor:
        return statistic.float()[:, None, None]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
