"""One attention function, several kernels behind it.

Axes: b batch, l tokens, h heads, d head width; lq and lk are the query's and the key's l.
"""

import warnings
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = ("auto", "sdpa", "flash", "efficient", "cudnn", "math", "xformers", "flex", "matmul")
LINEAR = ("sdpa", "flash", "efficient", "cudnn", "xformers", "flex")  # in memory; flex on CUDA alone
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
CUDA_ONLY = ("efficient", "cudnn", "xformers")
HALF_ONLY = ("flash", "cudnn")  # on CUDA


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Softmax attention of q (b, lq, h, d) over k and v (b, lk, h, d), scaled by d^-1/2; (b, lq, h, d).

    mask: key padding, (b, lk) bool, True where a key may be read; every row keeps at least one key.

    kernel: one of KERNELS.
        auto        matmul while training on a CPU, where SDPA's backward is four times slower; else sdpa
        sdpa        PyTorch's own, which picks among its backends
        flash, efficient, cudnn, math   that backend of it (FlashAttention-2: arXiv:2307.08691)
        xformers    xformers.ops.memory_efficient_attention
        flex        PyTorch's flex_attention
        matmul      the plain formula: memory grows with lq x lk, as that of math
    Where the machine lacks a kernel, so that a model saved with it still runs, one warning says so and auto takes
    its place. ValueError for an unknown kernel, and for a dtype that a kernel does not take.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    learns = torch.is_grad_enabled()
    kernel = _runnable(kernel, q.device.type, learns)
    if kernel == "auto":
        kernel = "matmul" if q.device.type == "cpu" and learns else "sdpa"
    if q.is_cuda and kernel in HALF_ONLY and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the {kernel} kernel takes bfloat16 or float16, not {q.dtype}: autocast, or use efficient"
        )
    if kernel == "matmul":
        return _matmul(q, k, v, mask)
    if kernel == "xformers":
        return _xformers(q, k, v, mask)
    if kernel == "flex":
        return _flex(q, k, v, mask)
    if kernel == "flash" and q.is_cuda and mask is not None:
        return flash_padded(q, k, v, mask)
    return _sdpa(q, k, v, mask, kernel)


# ---- kernels ---------------------------------------------------------------------------------------------


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str, scale: float | None = None
) -> Tensor:
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    keep = None if mask is None else rearrange(mask, "b lk -> b 1 1 lk")
    with sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
    return rearrange(out, "b h l d -> b l h d")


def flash_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Key padding for the flash backend, which takes no mask on CUDA: eight more channels of q and k carry it.

    They add 0 to the score of a key to read and at least -8e4 d^-1/2 to that of another, whose weight is then
    exactly 0. Memory stays linear, nothing waits for the GPU, and it compiles; the wider heads cost some time.
    """
    d = q.shape[-1]
    bias = torch.zeros_like(k[..., :8]).masked_fill(~mask[:, :, None, None], -1e4)
    q, k, v = torch.cat([q, torch.ones_like(q[..., :8])], -1), torch.cat([k, bias], -1), F.pad(v, (0, 8))
    return _sdpa(q, k, v, None, "flash", d**-0.5)[..., :d]


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q * q.shape[-1] ** -0.5, k, v))
    score = q @ k.mT
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None, :], float("-inf"))
    weight = score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
    return rearrange(weight @ v, "b h l d -> b l h d")


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    def keep(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return torch.where(mask[b, j], score, float("-inf"))

    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    flex = _flex_attention(q.device.type)
    return rearrange(flex(q, k, v, score_mod=None if mask is None else keep), "b h l d -> b l h d")


@cache
def _flex_attention(device: str):
    """flex_attention; on CUDA compiled by itself, for outside `torch.compile` it would be the plain formula."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, attn_bias=None if mask is None else key_bias(mask, q))


def key_bias(mask: Tensor, q: Tensor) -> Tensor:
    """The bool mask (b, lk) as the additive bias (b, h, lq, lk) that xformers takes: 0 to keep, -inf to drop.

    A bool mask merely cast to the query's dtype would add 0 or 1 and mask nothing. xformers wants rows that
    start at multiples of 8 elements, hence the slice of a wider tensor; heads and queries share its memory.
    """
    (b, lk), (_, lq, h, _) = mask.shape, q.shape
    bias = q.new_zeros(b, 1, 1, -(-lk // 8) * 8)[..., :lk]
    bias.masked_fill_(~mask[:, None, None, :], float("-inf"))
    return bias.expand(b, h, lq, lk)


# ---- which of them run here ------------------------------------------------------------------------------


def _runnable(kernel: str, device: str, learns: bool) -> str:
    """The kernel, or auto after a warning where it cannot run."""
    why = _missing(kernel, device, learns)
    if not why:
        return kernel
    _warn_once(f"{why}; using PyTorch's attention")
    return "auto"


# What torch.compiler.assume_constant_result does, without its import of the compiler, half as long as torch's own.
_runnable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


@cache
def _missing(kernel: str, device: str, learns: bool) -> str:
    """Why a kernel cannot run on a type of device, in words; empty if it can."""
    if kernel == "xformers" and (why := _broken_xformers()):
        return why
    if kernel in CUDA_ONLY and device != "cuda":
        return f"the {kernel} attention kernel runs on CUDA alone, not on {device}"
    if kernel == "flash" and device not in ("cuda", "cpu"):
        return f"the flash attention kernel does not run on {device}"
    if kernel == "flex" and device == "cpu" and learns:
        return "flex_attention has no backward on a CPU"
    return ""


def _broken_xformers() -> str:
    """Why xformers cannot be used; empty if it can. A binary built for another PyTorch fails in many ways."""
    try:
        import xformers.ops
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "xformers":
            return "xformers is missing (pip install 'diffusionfm[gpu]')"
        return f"xformers cannot be loaded ({_first_line(error)})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"xformers cannot be loaded ({_first_line(error)})"
    library = getattr(xformers, "_cpp_lib", None)  # it keeps this failure to itself until it is called
    kept = getattr(library, "_cpp_library_load_exception", None)
    return f"xformers cannot be loaded ({_first_line(kept)})" if kept else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
