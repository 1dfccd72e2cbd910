"""The diffusion transformer: latents, time and text in, velocity out.

The text is read, never written: in every block the image's queries attend over [text keys ; image keys] in
one attention. The text's keys and values depend on the text alone, so sampling computes them once (PRX).

Axes: b batch, l tokens (the image's unless said otherwise), h heads, d head width, w model width, c channels,
      y x rows and columns of tokens, p q those of pixels within a patch, n parts of a projection.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from .attention import attention

KeyValue = tuple[Tensor, Tensor]  # the text's k and v for one attention, (b, l, h, d) each


class DiffusionTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
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
        attention_kernel: one of `attention.KERNELS`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    lora_targets = ["attention.qkv", "attention.text_kv", "attention.out", "mlp.gate_up", "mlp.down"]

    @register_to_config
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
        attention_kernel: str = "auto",
    ):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of 4 x heads = {4 * heads}")
        self.gradient_checkpointing = False
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
        p, rows, columns = self.config.patch, *x.shape[-2:]
        if rows % p or columns % p:
            raise ValueError(f"a latent of {rows}x{columns} does not cut into patches; use multiples of {p}")
        rows, columns = rows // p, columns // p

        text = self.text_in(text)
        text_kv = text_kv or self._read(text)
        modulation = self.modulation(F.silu(self.condition(t, text, mask)))
        modulation = rearrange(modulation, "b (n w) -> n b 1 w", n=6)
        rope = axial_rope(rows, columns, self.config.width // self.config.heads, self.config.grid, x.device)
        keys = F.pad(mask, (0, self.config.registers + rows * columns), value=True)

        x = self.patch_in(rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p))
        for block, kv in zip(self.blocks, text_kv, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, modulation, kv, keys, rope)
            else:
                x = block(x, modulation, kv, keys, rope)
        shift, scale = (modulation[:2] + self.final_bias).to(x.dtype)
        x = self.patch_out(modulate(x, shift, scale))
        return rearrange(x, "b (y x) (c p q) -> b c (y p) (x q)", y=rows, p=p, q=p)

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
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b l h d", n=3, h=self.heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        text_k, text_v = text_kv
        x = attention(q, torch.cat([text_k, k], 1), torch.cat([text_v, v], 1), mask, self.kernel)
        return self.out(rearrange(x, "b l h d -> b l (h d)"))

    def text_keys_values(self, text: Tensor) -> KeyValue:
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
    """Turn the pairs (x[..., i], x[..., i + d / 2]) of x (b, l, h, d) by the angles of `axial_rope`."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
