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


def shrunk(picture: Tensor, factor: int) -> Tensor:
    """Straight RGBA (b, 4, y, x) in [0, 1] a `factor` smaller: the mean over pixels, colours weighted by alpha."""
    return unpremultiply(F.avg_pool2d(premultiply(picture), factor))


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


class Upscaler(nn.Module):
    """The decoder carried on to four times the size: its last features and its picture -> the picture, sharper.

    What it adds lies over the picture's bicubic enlargement, and is nothing at first (as in EDSR, arXiv:1707.02921).
    features: channels (b, c, y/2, x/2) of what the decoder knew last. widths: channels at 1/2 and at the whole size.
    """

    factor = 4

    def __init__(self, features: int, widths: Sequence[int]):
        super().__init__()
        half, whole = widths
        self.detail = nn.Sequential(
            nn.Conv2d(features, half, 3, padding=1),
            *blocks(half, 1),
            nn.Conv2d(half, 4 * whole, 1),
            nn.PixelShuffle(2),
            *blocks(whole, 1),
            ChannelNorm(whole),
            nn.SiLU(),
            nn.Conv2d(whole, 4 * self.factor**2, 3, padding=1),
            nn.PixelShuffle(self.factor),
        )

    def forward(self, features: Tensor, picture: Tensor) -> Tensor:
        """Features (b, c, y/2, x/2) and picture (b, 4, y, x) -> picture (b, 4, 4y, 4x) in the picture's range."""
        larger = F.interpolate(picture, scale_factor=self.factor, mode="bicubic")
        return larger + self.detail(features)


class AutoencoderNetwork(nn.Module):
    """KL autoencoder of RGBA pictures (Rombach et al. 2022, arXiv:2112.10752), fully convolutional.

    Pictures are straight-alpha RGBA in [0, 1], (b, 4, y, x) with y and x divisible by 8; latents are (b,
    latent_channels, y/8, x/8) with mean 0 and standard deviation 1 once `set_latent_statistics` was called.
    Inside, a picture is premultiplied RGB and alpha, mapped to [-1, 1], so colour nobody sees costs nothing.

    latent_channels: channels of a latent.
    widths: channels at 1/2, 1/4 and 1/8 of the picture's size.
    encoder_depths: residual blocks at 1/4 and 1/8.
    decoder_depths: residual blocks at 1/2, 1/4 and 1/8.
    upscaler_widths: of an `Upscaler` that also decodes at twice and four times the size; None: there is none.
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
        upscaler_widths: Sequence[int] | None = None,
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
        self.upscaler = None if upscaler_widths is None else Upscaler(half, upscaler_widths)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        for module in self.modules():
            if isinstance(module, ResidualBlock):  # every block starts as the identity
                for parameter in module.conv2.parameters():
                    nn.init.zeros_(parameter)
            if isinstance(module, Upscaler):
                for parameter in module.detail[-2].parameters():
                    nn.init.zeros_(parameter)

    @property
    def scales(self) -> tuple[int, ...]:
        """How many times larger than encoded a latent can be decoded."""
        return (1,) if self.upscaler is None else (1, 2, 4)

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
        return (self.decoder(self._inside(latent)).float() + 1) / 2

    def decode_raw_large(self, features: Tensor, picture: Tensor) -> Tensor:
        """Premultiplied RGBA (b, 4, 4y, 4x), unclamped, of what `features` gives."""
        assert self.upscaler is not None
        return (self.upscaler(features, picture).float() + 1) / 2

    def features(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder knows last (b, c, y/2, x/2) of a raw latent, and its picture (b, 4, y, x) in [-1, 1]."""
        features = self.decoder[:-2](self._inside(latent))
        return features, self.decoder[-2:](features)

    def decode(self, latent: Tensor, scale: int = 1) -> Tensor:
        """Straight float32 RGBA, clamped to [0, 1], of normalised latents (b, c, y/8, x/8): (b, 4, y, x) times `scale`.

        scale: one of `scales`, or ValueError. Twice the size is the mean over pixels of four times the size.
        """
        if scale not in self.scales:
            known = ", ".join(map(str, self.scales))
            raise ValueError(f"this autoencoder decodes at {known} times its size, not {scale}")
        raw = latent.float() * self._channels(self.latent_std) + self._channels(self.latent_mean)
        if scale == 1:
            return unpremultiply(self.decode_raw(raw))
        picture = unpremultiply(self.decode_raw_large(*self.features(raw)))
        return picture if scale == Upscaler.factor else shrunk(picture, Upscaler.factor // scale)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Keep the per-channel mean and standard deviation, each (c,), of raw latents over a training set."""
        shape = (self.latent_channels,)
        if mean.shape != shape or std.shape != shape or not bool((std > 0).all()):
            raise ValueError(f"latent statistics must be two tensors of shape {shape}, every std above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _inside(self, latent: Tensor) -> Tensor:
        return latent.to(_dtype(self.decoder)).contiguous(memory_format=torch.channels_last)

    def _channels(self, statistic: Tensor) -> Tensor:
        return statistic.float()[:, None, None]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
