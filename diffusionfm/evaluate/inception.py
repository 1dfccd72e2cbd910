"""FID's own network (arXiv:1706.08500) for those who have its weights: the Inception v3 of 2015-12-05, as pytorch-fid
carries it over from TensorFlow. It differs from later ones in its classes and in how it pools.

Axes: b pictures, c channels, y x rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionfm.evaluate.describe import groups, pixels
from diffusionfm.images import on_background

SIDE = 299
CLASSES = 1008  # later ones have 1,000: what keeps their weights out
Kernel = int | tuple[int, int]
ACROSS, DOWN = (1, 7), (7, 1)


class Conv(nn.Module):
    """Convolution, batch norm and ReLU; padded to keep the size unless it has a stride or is told not to."""

    def __init__(self, inward: int, outward: int, kernel: Kernel, stride: int = 1, pad: bool = True):
        super().__init__()
        padding = "same" if pad and stride == 1 else 0
        self.conv = nn.Conv2d(inward, outward, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outward, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined by channels: each a chain of convolutions, that of `branch_pool` after the pool.

    A link of a chain is (channels, kernel), or (channels, kernel, kernel) for two side by side; the last strides.
    """

    def __init__(self, inward: int, pool: nn.Module, stride: int = 1, **branches: list[tuple]):
        super().__init__()
        self.pool = pool
        self.names: dict[str, list[list[str]]] = {branch: [] for branch in branches}
        for branch, chain in branches.items():
            width = inward
            for k, (outward, *kernels) in enumerate(chain, 1):
                name = f"{branch}_{k}" if len(chain) > 1 else branch
                names = [name + letter for letter in "ab"] if len(kernels) > 1 else [name]
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, Conv(width, outward, kernel, stride if k == len(chain) else 1))
                self.names[branch].append(names)
                width = outward * len(names)

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for branch, chain in self.names.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            joined.append(y)
        return torch.cat(joined, 1)


def average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def block_a(inward: int, pooled: int) -> Mixed:
    return Mixed(
        inward,
        average(),
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )


def block_c(inner: int) -> Mixed:
    return Mixed(
        768,
        average(),
        branch1x1=[(192, 1)],
        branch7x7=[(inner, 1), (inner, ACROSS), (192, DOWN)],
        branch7x7dbl=[(inner, 1), (inner, DOWN), (inner, ACROSS), (inner, DOWN), (192, ACROSS)],
        branch_pool=[(192, 1)],
    )


def block_e(inward: int, pool: nn.Module) -> Mixed:
    fork = (384, (1, 3), (3, 1))
    return Mixed(
        inward,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), fork],
        branch3x3dbl=[(448, 1), (384, 3), fork],
        branch_pool=[(192, 1)],
    )


class Inception(nn.Module):
    """RGB (b, 3, y, x) in [0, 1] of any size -> features (b, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.pool_4 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        double = [(64, 1), (96, 3), (96, 3)]
        self.Mixed_6a = Mixed(
            288, nn.MaxPool2d(3, 2), 2, branch3x3=[(384, 3)], branch3x3dbl=double, branch_pool=[]
        )
        self.Mixed_6b = block_c(128)
        self.Mixed_6c = block_c(160)
        self.Mixed_6d = block_c(160)
        self.Mixed_6e = block_c(192)
        long = [(192, 1), (192, ACROSS), (192, DOWN), (192, 3)]
        self.Mixed_7a = Mixed(
            768, nn.MaxPool2d(3, 2), 2, branch3x3=[(192, 1), (320, 3)], branch7x7x3=long, branch_pool=[]
        )
        self.Mixed_7b = block_e(1280, average())
        self.Mixed_7c = block_e(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(2048, CLASSES)  # of the file, and of no use here

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear") - 1
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return x.mean((2, 3))

    @torch.inference_mode()
    def see(self, pictures: Iterable[Image.Image], batch_size: int = 8) -> np.ndarray:
        """The features (n, 2048) of pictures, laid on white."""
        flat = (pixels(on_background(picture, "#ffffff")) for picture in pictures)
        return np.concatenate([self(torch.stack(group)).numpy() for group in groups(flat, batch_size)])


def load_inception(path: Path) -> Inception:
    """The network with the weights of a safetensors file in pytorch-fid's names, frozen; `ValueError` for any other."""
    network = Inception()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not hold the weights of FID's Inception in safetensors ({reason}): "
            "`diffusionfm evaluate --help` tells how to make it"
        ) from error
    return network.eval().requires_grad_(False)
