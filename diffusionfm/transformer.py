"""The diffusion transformer: latents, time and text in, velocity out.

The text is read, never written: in every block the image's queries attend over [text keys ; image keys] in
one attention. The text's keys and values depend on the text alone, so sampling computes them once (PRX).

Axes: b batch, l tokens (the image's unless said otherwise), h heads, d head width, w model width, c channels,
      y x rows and columns of tokens, p q those of pixels within a patch, n parts of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attention

if TYPE_CHECKING:
    from .models import DiffusionTransformer as DiffusionTransformer

KeyValue = tuple[Tensor, Tensor]  # the text's k and v for one attention, (b, l, h, d) each
LEAST_TIME = 0.05  # x0 prediction divides by the time, but by no less than this (JiT)


def __getattr__(name: str) -> Any:
    if name == "DiffusionTransformer":  # loads diffusers, which drawing does without
        from . import models

        return models.DiffusionTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TransformerNetwork(nn.Module):
    """DiT with read-only text, RMSNorm, QK-norm, SwiGLU, axial RoPE and one AdaLN shared by all blocks.

    (DiT: arXiv:2212.09748; AdaLN-single: PixArt-alpha, arXiv:2310.00426.)

    Args:
        in_channels: channels of the latent.
        patch: latent pixels a side of a token.
        width, depth, heads: the usual; width must be a multiple of 4 x heads.
        mlp_ratio: SwiGLU hidden width over width, rounded to a multiple of 32.
        text_dim: width of the text encoder's tokens.
        registers: learned text tokens that are never masked, so that an empty or fully masked prompt still
            leaves the attention something neutral to read.
        condition_dim: width of the vector, made of time and pooled text, that modulates every block.
        grid: tokens a side at the training resolution; RoPE scales the positions of any other grid to it.
        prediction: what `patch_out` gives: the "velocity" itself, or the clean latent, "x0", from which the velocity
            follows. Where a token holds about as many numbers as the network is wide, x0 is far easier: noise fills
            all of them, pictures do not (JiT, arXiv:2511.13720).
        attention_kernel: one of `attention.KERNELS`.
        route: {share, start, end}: while training, a random `share` of the image's tokens, others in each picture and
            step, skips the blocks [start, end) and comes back as it was (TREAD, arXiv:2501.04765); a negative end
            counts from the last block. {share: 0.5, start: 2, end: -2} suits 1,024 tokens and more. Of 64 or 256
            tokens each holds too much of the picture: quality falls and little time is won, so None, off, is the
            default. Train the last tenth of the steps without it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    lora_targets = ["attention.qkv", "attention.text_kv", "attention.out", "mlp.gate_up", "mlp.down"]

    _gradient_checkpointing_func: Callable  # set by diffusers' enable_gradient_checkpointing

    def __init__(
        self,
        in_channels: int = 16,
        patch: int = 2,
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
        mlp_ratio: float = 8 / 3,
        text_dim: int = 256,
        registers: int = 4,
        condition_dim: int = 128,
        grid: int = 8,
        prediction: str = "velocity",
        attention_kernel: str = "auto",
        route: dict | None = None,
    ):
        super().__init__()
        if prediction not in ("velocity", "x0"):
            raise ValueError(f'prediction is "velocity" or "x0", not {prediction!r}')
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of 4 x heads = {4 * heads}")
        self.gradient_checkpointing = False
        self.patch, self.grid, self.registers, self.prediction = patch, grid, registers, prediction
        self.head_width = width // heads
        self.route = None if route is None else Route.of(depth, route)
        self.patch_in = nn.Linear(in_channels * patch**2, width)
        self.text_in = TextProjection(text_dim, width, registers)
        self.condition = Condition(condition_dim, width)
        self.modulation = nn.Linear(condition_dim, 6 * width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, mlp_ratio, attention_kernel) for _ in range(depth)
        )
        self.final_bias = nn.Parameter(torch.zeros(2, 1, 1, width))
        self.patch_out = nn.Linear(width, in_channels * patch**2)
        self.init_weights()

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, text_kv: list[KeyValue] | None = None
    ) -> Tensor:
        """Latents x (b, c, y, x), times t (b,) in [0, 1], text (b, l, text_dim), mask (b, l) bool -> v as x.

        text_kv: `text_keys_values(text)`, to save computing it at every sampling step. Any rows and columns
        divisible by the patch will do; ValueError otherwise.
        """
        p, rows, columns = self.patch, *x.shape[-2:]
        if rows % p or columns % p:
            raise ValueError(f"a latent of {rows}x{columns} does not cut into patches; use multiples of {p}")
        rows, columns = rows // p, columns // p

        text = self.text_in(text)
        text_kv = text_kv or self._read(text)
        modulation = self.modulation(F.silu(self.condition(t, text, mask)))
        modulation = rearrange(modulation, "b (n w) -> n b 1 w", n=6)
        rope = axial_rope(rows, columns, self.head_width, self.grid, x.device)
        keys = F.pad(mask, (0, self.registers + rows * columns), value=True)

        h = self.patch_in(rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p))
        h = self._through(list(zip(self.blocks, text_kv, strict=True)), h, modulation, keys, rope, self.route)
        shift, scale = (modulation[:2] + self.final_bias).to(h.dtype)
        h = self.patch_out(modulate(h, shift, scale))
        out = rearrange(h, "b (y x) (c p q) -> b c (y p) (x q)", y=rows, p=p, q=p)
        if self.prediction == "velocity":
            return out
        return (x - out) / t.clamp(min=LEAST_TIME)[:, None, None, None].type_as(x)

    def _through(
        self,
        blocks: list[tuple[nn.Module, KeyValue]],
        h: Tensor,
        modulation: Tensor,
        keys: Tensor,
        rope: Tensor,
        route: Route | None = None,
    ) -> Tensor:
        """h after the blocks; with a route, while training, some of its tokens skip some of them."""
        if route and self.training:
            before, inside, after = (
                blocks[: route.start],
                blocks[route.start : route.end],
                blocks[route.end :],
            )
            h = self._through(before, h, modulation, keys, rope)
            kept = route.choose(h)
            at = kept[..., None].expand(-1, -1, h.shape[-1])
            skipped = h.shape[1] - kept.shape[1]
            fewer = keys[:, : keys.shape[1] - skipped]  # every image key is read, so any of them may go
            h = h.scatter(1, at, self._through(inside, h.gather(1, at), modulation, fewer, rope[:, kept]))
            return self._through(after, h, modulation, keys, rope)
        for block, kv in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, modulation, kv, keys, rope)
            else:
                h = block(h, modulation, kv, keys, rope)
        return h

    def text_keys_values(self, text: Tensor) -> list[KeyValue]:
        """What every block reads of text (b, l, text_dim), registers included: constant while sampling."""
        return self._read(self.text_in(text))

    def _read(self, text: Tensor) -> list[KeyValue]:
        text = self.text_in.with_registers(text)
        return [block.read(text) for block in self.blocks]  # type: ignore[operator]

    def init_weights(self) -> None:
        """Set every weight, in this one place.

        linear layers                 Xavier uniform, bias 0
        registers                     normal, std 0.02
        norm gains                    1
        modulation and its biases     0: gates closed, every block begins as the identity (adaLN-Zero)
        patch_out                     0: the first prediction is 0
        """
        self.apply(init_linear)
        nn.init.normal_(self.text_in.registers, std=0.02)
        for layer in (self.modulation, self.patch_out):
            nn.init.zeros_(layer.weight)


# ---- token routing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A `share` of the tokens goes around the blocks [start, end)."""

    share: float
    start: int
    end: int

    @classmethod
    def of(cls, depth: int, given: dict) -> Route:
        """The route that a config gives to a network of `depth` blocks; ValueError if it leads nowhere."""
        if set(given) != {"share", "start", "end"}:
            raise ValueError(
                f"route takes the keys share, start and end, not {', '.join(map(str, given)) or 'none'}: "
                "{share: 0.5, start: 2, end: -2} is a fair start"
            )
        share, start, end = given["share"], given["start"], given["end"]
        if not all(type(block) is int for block in (start, end)):
            raise ValueError(f"route.start and route.end are numbers of blocks, not {start!r} and {end!r}")
        end = end + depth if end < 0 else end
        if not isinstance(share, float) or not 0 < share < 1:
            raise ValueError(
                f"route.share is the share of tokens to leave out, between 0 and 1, not {share!r}"
            )
        if not 0 <= start < end <= depth:
            raise ValueError(
                f"route goes from block {start} to {given['end']}, but there are blocks 0 to {depth}"
            )
        return cls(share, start, end)

    def choose(self, h: Tensor) -> Tensor:
        """Which of the tokens h (b, l, w) stay, (b, n): drawn a picture from torch's global generator."""
        b, tokens, _ = h.shape
        count = max(1, round(tokens * (1 - self.share)))
        return torch.rand(b, tokens, device=h.device).argsort(1)[:, :count]


# ---- a block ---------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """Attention, then MLP, each modulated and gated by the shared modulation plus this block's own bias."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, kernel: str):
        super().__init__()
        self.attention = ReadingAttention(width, heads, width, kernel)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.bias = nn.Parameter(torch.zeros(6, 1, 1, width))

    def forward(self, x: Tensor, modulation: Tensor, text_kv: KeyValue, mask: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation + self.bias).to(x.dtype)
        x = x + gate * self.attention(modulate(x, shift, scale), text_kv, mask, rope)
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))

    def read(self, text: Tensor) -> KeyValue:
        """This block's keys and values of projected text (b, l, w)."""
        return self.attention.text_keys_values(text)


class ReadingAttention(nn.Module):
    """Image queries over [text keys ; image keys] in one softmax; only the image is updated."""

    def __init__(self, width: int, heads: int, text_width: int, kernel: str):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.text_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.q_norm, self.k_norm, self.text_k_norm = (RMSNorm(width // heads) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, text_kv: KeyValue, mask: Tensor, rope: Tensor) -> Tensor:
        q, k, v = of_image(self, x, rope)
        text_k, text_v = text_kv
        x = attention(q, torch.cat([text_k, k], 1), torch.cat([text_v, v], 1), mask, self.kernel)
        return self.out(rearrange(x, "b l h d -> b l (h d)"))

    def text_keys_values(self, text: Tensor) -> KeyValue:
        """The text's keys, normed, and values (b, l, h, d), of projected text (b, l, w)."""
        k, v = rearrange(self.text_kv(text), "b l (n h d) -> n b l h d", n=2, h=self.heads)
        return self.text_k_norm(k), v


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), gate and up in one projection (arXiv:2002.05202)."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = max(1, round(width * ratio / 32)) * 32
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in its input's dtype: a float32 gain beside bfloat16 input would miss the fused kernel."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# ---- time and text, shared with the U-Net ----------------------------------------------------------------


class TextProjection(nn.Module):
    """The text encoder's tokens, normed and projected once to the model's width, and the registers."""

    def __init__(self, text_dim: int, width: int, registers: int):
        super().__init__()
        self.norm = RMSNorm(text_dim)
        self.proj = nn.Linear(text_dim, width)
        self.registers = nn.Parameter(torch.zeros(registers, width))

    def forward(self, text: Tensor) -> Tensor:
        return self.proj(self.norm(text))

    def with_registers(self, text: Tensor) -> Tensor:
        """Projected text (b, l, w) and the registers behind it, (b, l + registers, w)."""
        return torch.cat([text, self.registers.type_as(text).expand(len(text), -1, -1)], 1)


class Condition(nn.Module):
    """Time and the mean of the unmasked text tokens -> one vector (b, dim)."""

    def __init__(self, dim: int, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text = nn.Linear(width, dim)

    def forward(self, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        total = torch.where(mask[..., None], text, 0).sum(1)
        pooled = total / mask.sum(1, keepdim=True).clamp(min=1)
        return self.time(time_features(t, self.frequencies).type_as(text)) + self.text(pooled.type_as(text))


def time_features(t: Tensor, count: int) -> Tensor:
    """Cosines and sines of 1000 t at geometric frequencies from 1 to 1/10,000: (b,) -> (b, count) float32."""
    steps = torch.arange(count // 2, dtype=torch.float32, device=t.device)
    angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10_000) / (count // 2) * steps)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ---- functions -------------------------------------------------------------------------------------------


def of_image(attention: ReadingAttention, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (b, l, h, d) of the picture's tokens.

    No method: FSDP gathers a module's weights for a public one and lets them go when it returns, amid the forward."""
    q, k, v = rearrange(attention.qkv(x), "b l (n h d) -> n b l h d", n=3, h=attention.heads)
    return rotate(attention.q_norm(q), rope), rotate(attention.k_norm(k), rope), v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMS-normalise x (b, l, w), then scale and shift it."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def axial_rope(rows: int, columns: int, head_dim: int, grid: int, device: torch.device | str) -> Tensor:
    """Cosines and sines (2, l, 1, d / 2) for tokens in row-major order: y turns half the pairs, x the others.

    Positions count from the centre in training tokens: a grid of any size is scaled to the area of grid x
    grid, so more tokens mean a finer picture of the same extent and the angles stay near the trained range.
    Base 100 suits grids of 8 to 64 a side as 10,000 suits text (RoFormer, arXiv:2104.09864).
    """
    unit = grid / math.sqrt(rows * columns)
    y = (torch.arange(rows, device=device) - (rows - 1) / 2) * unit
    x = (torch.arange(columns, device=device) - (columns - 1) / 2) * unit
    position = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    frequency = 100 ** -torch.linspace(0, 1, head_dim // 4, device=device)
    angle = rearrange(position[..., None] * frequency, "y x n d -> (y x) 1 (n d)")
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (x[..., i], x[..., i + d / 2]) of x (b, l, h, d) by the angles of `axial_rope`.

    rope: (2, l, 1, d / 2), or (2, b, l, 1, d / 2) where each picture has tokens of its own.
    """
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def init_linear(module: nn.Module) -> None:
    """Xavier weights and a bias of 0 for a linear layer; other modules stay."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
