"""One attention function, several kernels behind it.

Axes: b batch, l tokens, h heads, d head width; lq and lk are the query's and the key's l.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

KERNELS = ("auto", "sdpa", "matmul", "xformers", "flex")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Softmax attention of q (b, lq, h, d) over k and v (b, lk, h, d), scaled by d^-1/2; (b, lq, h, d).

    mask: key padding, (b, lk) bool, True where a key may be read; every row keeps at least one key.

    kernel: "sdpa" is PyTorch's own; "matmul" is the plain formula; "auto" is "matmul" while training on a
    CPU, where SDPA's backward is four times slower, and "sdpa" elsewhere; "xformers" runs on CUDA if that
    package is installed (else a warning, and "auto"); "flex" is `flex_attention`, best under `torch.compile`.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    if kernel == "xformers" and (memory_efficient := _xformers()) and q.is_cuda:
        return memory_efficient(q, k, v, attn_bias=None if mask is None else key_bias(mask, q))
    if kernel == "flex":
        return _flex(q, k, v, mask)
    if kernel == "matmul" or (kernel != "sdpa" and q.device.type == "cpu" and torch.is_grad_enabled()):
        return _matmul(q, k, v, mask)
    return _sdpa(q, k, v, mask)


def key_bias(mask: Tensor, q: Tensor) -> Tensor:
    """The bool mask (b, lk) as the additive bias (b, h, lq, lk) that xformers takes: 0 to keep, -inf to drop.

    A bool mask merely cast to the query's dtype would add 0 or 1 and mask nothing. xformers wants rows that
    start at multiples of 8 elements, hence the slice of a wider tensor; heads and queries share its memory.
    """
    (b, lk), (_, lq, h, _) = mask.shape, q.shape
    bias = q.new_zeros(b, 1, 1, -(-lk // 8) * 8)[..., :lk]
    bias.masked_fill_(~mask[:, None, None, :], float("-inf"))
    return bias.expand(b, h, lq, lk)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    keep = None if mask is None else rearrange(mask, "b lk -> b 1 1 lk")
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=keep), "b h l d -> b l h d")


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q * q.shape[-1] ** -0.5, k, v))
    score = q @ k.mT
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None, :], float("-inf"))
    weight = score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
    return rearrange(weight @ v, "b h l d -> b l h d")


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def keep(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return torch.where(mask[b, j], score, float("-inf"))

    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    return rearrange(flex_attention(q, k, v, score_mod=None if mask is None else keep), "b h l d -> b l h d")


@cache
def _xformers() -> Callable[..., Tensor] | None:
    """xformers' kernel, or None after one warning; looked for once, when first asked for."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        hint = "xformers is missing (pip install 'diffusionfm[gpu]'); using PyTorch's attention"
        warnings.warn(hint, stacklevel=3)
        return None
    return memory_efficient_attention
