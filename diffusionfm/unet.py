"""The diffusion U-Net: the same call as `DiffusionTransformer`, with convolutions where that has patches.

Axes: b batch, l tokens, c channels, y x rows and columns of the latent (of a level, inside a block).
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from .transformer import Condition, KeyValue, ReadingAttention, TextProjection, axial_rope, init_linear


class DiffusionUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A residual U-Net with FiLM (ADM, arXiv:2105.05233) that reads text as the DiT does.

    Args:
        in_channels: channels of the latent.
        widths: channels of each level, each half the resolution of the one before; multiples of 32.
        blocks: residual blocks a level, on the way down and again on the way up.
        attention_levels: the levels whose blocks attend over text and image.
        heads: heads of each attention.
        text_dim: width of the text encoder's tokens.
        text_width: width they are projected to.
        registers, condition_dim, attention_kernel: as in `DiffusionTransformer`.
        grid: latent pixels a side at the training resolution.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetBlock"]
    _repeated_blocks = ["UNetBlock"]
    lora_targets = ["attention.qkv", "attention.text_kv", "attention.out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        widths: tuple[int, ...] = (128, 256),
        blocks: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        heads: int = 4,
        text_dim: int = 256,
        text_width: int = 256,
        registers: int = 4,
        condition_dim: int = 256,
        grid: int = 16,
        attention_kernel: str = "auto",
    ):
        super().__init__()
        if any(width % 32 or width % (4 * heads) for width in widths):
            raise ValueError(f"widths {list(widths)} must be multiples of 32 and of 4 x heads = {4 * heads}")
        self.gradient_checkpointing = False

        def block(level: int, width_in: int, resample: str = "") -> UNetBlock:
            attention = None
            if level in attention_levels:
                attention = ReadingAttention(widths[level], heads, text_width, attention_kernel)
            return UNetBlock(width_in, widths[level], condition_dim, attention, grid // 2**level, resample)

        width, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.text_in = TextProjection(text_dim, text_width, registers)
        self.condition = Condition(condition_dim, text_width)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(len(widths)):
            for i in range(blocks):
                self.down.append(block(level, width, "down" if i == 0 and level > 0 else ""))
                width = widths[level]
        self.middle = block(last, width)
        for level in reversed(range(len(widths))):
            for i in range(blocks):
                self.up.append(block(level, width + widths[level], "up" if i == 0 and level < last else ""))
                width = widths[level]
        self.norm_out = nn.GroupNorm(32, width)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        self.init_weights()

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, text_kv: list[KeyValue] | None = None
    ) -> Tensor:
        """Latents x (b, c, y, x), times t (b,) in [0, 1], text (b, l, text_dim), mask (b, l) bool -> v as x.

        text_kv: `text_keys_values(text)`, to save computing it at every sampling step. Rows and columns must
        halve evenly down to the last level; ValueError otherwise.
        """
        multiple, (rows, columns) = 2 ** (len(self.config.widths) - 1), x.shape[-2:]
        if rows % multiple or columns % multiple:
            raise ValueError(f"a latent of {rows}x{columns} does not halve; use multiples of {multiple}")

        text = self.text_in(text)
        unread = iter(text_kv or self._read(text))
        condition = F.silu(self.condition(t, text, mask))
        keys = F.pad(mask, (0, self.config.registers), value=True)

        def run(block: nn.Module, x: Tensor) -> Tensor:
            kv = next(unread) if block.attention else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return self._gradient_checkpointing_func(block, x, condition, kv, keys)
            return block(x, condition, kv, keys)

        x, skips = self.conv_in(x), []
        for block in self.down:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle, x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0) if block.resample == "up" else x
            x = run(block, torch.cat([x, skips.pop()], 1))
        return self.conv_out(F.silu(self.norm_out(x)))

    def text_keys_values(self, text: Tensor) -> list[KeyValue]:
        """What each attention reads of text (b, l, text_dim), registers included: constant while sampling."""
        return self._read(self.text_in(text))

    def _read(self, text: Tensor) -> list[KeyValue]:
        text = self.text_in.with_registers(text)
        return [block.attention.text_keys_values(text) for block in self._blocks() if block.attention]

    def _blocks(self) -> list["UNetBlock"]:
        return [*self.down, self.middle, *self.up]

    def init_weights(self) -> None:
        """Set every weight, in this one place.

        linear layers                 Xavier uniform, bias 0
        convolutions                  PyTorch's own, Kaiming uniform
        registers                     normal, std 0.02
        norm gains                    1
        FiLM                          0: scale 1, shift 0
        last layer of every branch    0: each block begins as its skip, and the first prediction is 0
        """
        self.apply(init_linear)
        nn.init.normal_(self.text_in.registers, std=0.02)
        for block in self._blocks():
            nn.init.zeros_(block.film.weight)
            if block.attention:
                nn.init.zeros_(block.attention.out.weight)
        for conv in (self.conv_out, *(block.conv_out for block in self._blocks())):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)


class UNetBlock(nn.Module):
    """Two convolutions with FiLM between them, then one attention over text and image where there is one."""

    def __init__(
        self,
        width_in: int,
        width: int,
        condition_dim: int,
        attention: ReadingAttention | None,
        grid: int,
        resample: str,
    ):
        super().__init__()
        self.grid, self.resample = grid, resample
        self.norm_in = nn.GroupNorm(32, width_in)
        self.conv_in = nn.Conv2d(width_in, width, 3, padding=1)
        self.film = nn.Linear(condition_dim, 2 * width)
        self.norm_out = nn.GroupNorm(32, width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attention = attention
        self.norm_attention = nn.GroupNorm(32, width) if attention else None

    def forward(self, x: Tensor, condition: Tensor, text_kv: KeyValue | None, mask: Tensor) -> Tensor:
        """x (b, c, y, x), condition (b, d), mask (b, l) over text -> (b, c, y, x), halved if "down"."""
        x = F.avg_pool2d(x, 2) if self.resample == "down" else x
        scale, shift = rearrange(self.film(condition), "b (n c) -> n b c 1 1", n=2)
        inner = self.conv_in(F.silu(self.norm_in(x)))
        inner = self.norm_out(inner) * (1 + scale) + shift
        x = self.skip(x) + self.conv_out(F.silu(inner))
        return x if text_kv is None else x + self._attend(x, text_kv, mask)

    def _attend(self, x: Tensor, text_kv: KeyValue, mask: Tensor) -> Tensor:
        assert self.attention is not None and self.norm_attention is not None
        rows, columns = x.shape[-2:]
        rope = axial_rope(rows, columns, x.shape[1] // self.attention.heads, self.grid, x.device)
        tokens = rearrange(self.norm_attention(x), "b c y x -> b (y x) c")
        tokens = self.attention(tokens, text_kv, F.pad(mask, (0, rows * columns), value=True), rope)
        return rearrange(tokens, "b (y x) c -> b c y x", y=rows)
