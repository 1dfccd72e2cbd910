"""Every attention kernel agrees with the formula in float64, with and without padded keys."""

import importlib.util
import warnings

import pytest
import torch

from diffusionfm.attention import _xformers, attention, key_bias


def reference(q, k, v, mask):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    score = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None], float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2)


def inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, 16, generator=generator).to(device, dtype) for n in (9, 13, 13))
    mask = torch.arange(13, device=device) < torch.tensor([[13], [5], [1]], device=device)
    return q, k, v, mask


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "matmul", "flex"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_agrees_with_float64(kernel, masked):
    q, k, v, mask = inputs()
    mask = mask if masked else None
    out = attention(q, k, v, mask, kernel)
    torch.testing.assert_close(out.double(), reference(q, k, v, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "matmul"])
def test_bfloat16_keeps_its_dtype_and_agrees(kernel):
    q, k, v, mask = inputs(torch.bfloat16)
    out = attention(q, k, v, mask, kernel)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(q, k, v, mask), atol=3e-2, rtol=3e-2)


def test_kernels_have_the_same_gradients():
    gradients = []
    for kernel in ("sdpa", "matmul", "auto"):
        q, k, v, mask = inputs()
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        attention(q, k, v, mask, kernel).square().sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    for a, b in [*zip(*gradients[:2], strict=True), *zip(*gradients[1:], strict=True)]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_xformers_bias_masks_and_is_aligned():
    q, k, v, mask = inputs()
    bias = key_bias(mask, q)
    assert bias.shape == (3, 2, 9, 13) and bias.stride(0) % 8 == 0
    assert bias[1, 0, 0, 4] == 0 and bias[1, 0, 0, 5] == float("-inf")
    score = torch.einsum("blhd,bmhd->bhlm", q, k) / 4 + bias
    out = torch.einsum("bhlm,bmhd->blhd", score.softmax(-1), v)
    torch.testing.assert_close(out.double(), reference(q, k, v, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_missing_xformers_is_one_warning():
    _xformers.cache_clear()
    with pytest.warns(UserWarning, match="xformers is missing"):
        assert _xformers() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _xformers() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["auto", "xformers"])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_on_cuda(kernel, masked):
    if kernel == "xformers":
        pytest.importorskip("xformers")
    q, k, v, mask = inputs(torch.bfloat16, "cuda")
    mask = mask if masked else None
    out = attention(q, k, v, mask, kernel)
    torch.testing.assert_close(out.double(), reference(q, k, v, mask), atol=3e-2, rtol=3e-2)


def test_unknown_kernel_names_the_choices():
    with pytest.raises(ValueError, match="sdpa"):
        attention(*inputs(), kernel="flash3")
