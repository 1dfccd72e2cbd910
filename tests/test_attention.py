"""Every attention kernel agrees with the formula in float64, with and without padded keys, backward too."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from benchmarks.common import peak_memory

from diffusionfm import attention as module
from diffusionfm.attention import KERNELS, attention, flash_padded, key_bias

LEARNING = ["auto", "sdpa", "flash", "math", "matmul"]  # on a CPU
READING = [*LEARNING, "flex"]  # without gradients
EXACT = dict(
    atol=1e-5, rtol=1e-5
)  # float32 outputs; ten times that for gradients, sums over 13 keys or 9 queries
COARSE = dict(atol=3e-2, rtol=3e-2)  # bfloat16: 8 bits of mantissa, values of about 1
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reference(q, k, v, mask):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    score = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None], float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2)


def inputs(masked=True, dtype=torch.float32, device="cpu", d=16):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, d, generator=generator).to(device, dtype) for n in (9, 13, 13))
    mask = torch.arange(13, device=device) < torch.tensor([[13], [5], [1]], device=device)
    return q, k, v, mask if masked else None


def gradients(function, q, k, v, mask, *more):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    weight = torch.linspace(-1, 1, q.numel(), device=q.device).view(
        q.shape
    )  # a loss that no symmetry makes zero
    (function(*leaves, mask, *more) * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


def times(tolerance, factor):
    return {key: factor * value for key, value in tolerance.items()}


@pytest.mark.parametrize("kernel", READING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_forward_agrees_with_float64(kernel, masked):
    given = inputs(masked)
    torch.testing.assert_close(attention(*given, kernel).double(), reference(*given), **EXACT)


@pytest.mark.parametrize("kernel", LEARNING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_agrees_with_float64(kernel, masked, dtype):
    given = inputs(masked, dtype)
    tolerance = times(EXACT if dtype is torch.float32 else COARSE, 10 if dtype is torch.float32 else 2)
    for ours, exact in zip(gradients(attention, *given, kernel), gradients(reference, *given), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact.double(), **tolerance)


@pytest.mark.parametrize("kernel", LEARNING)
def test_bfloat16_keeps_its_dtype_and_agrees(kernel):
    given = inputs(dtype=torch.bfloat16)
    out = attention(*given, kernel)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(*given), **COARSE)


def test_key_padding_in_channels_is_key_padding():
    given = inputs()
    torch.testing.assert_close(flash_padded(*given).double(), reference(*given), **EXACT)
    for ours, exact in zip(gradients(flash_padded, *given), gradients(reference, *given), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), **times(EXACT, 10))


def test_the_xformers_bias_masks_and_is_aligned():
    q, k, v, mask = inputs()
    bias = key_bias(mask, q)
    assert bias.shape == (3, 2, 9, 13) and bias.stride(0) % 8 == 0
    assert bias[1, 0, 0, 4] == 0 and bias[1, 0, 0, 5] == float("-inf")
    score = torch.einsum("blhd,bmhd->bhlm", q, k) / 4 + bias
    out = torch.einsum("bhlm,bmhd->blhd", score.softmax(-1), v)
    torch.testing.assert_close(out.double(), reference(q, k, v, mask), **EXACT)


# ---- a CUDA device ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_on_cuda(kernel, masked, dtype):
    if kernel == "xformers":
        pytest.importorskip("xformers")
    given = inputs(masked, dtype, "cuda", d=64)
    if dtype is torch.float32 and kernel in module.HALF_ONLY:
        with pytest.raises(ValueError, match="bfloat16"):
            attention(*given, kernel)
        return
    # TF32, if PyTorch is told to use it, keeps 10 bits of mantissa
    tolerance = COARSE if dtype is torch.bfloat16 else dict(atol=2e-3, rtol=2e-3)
    out = attention(*given, kernel)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(*given), **tolerance)
    for ours, exact in zip(gradients(attention, *given, kernel), gradients(reference, *given), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), **times(tolerance, 2))


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("kernel", module.LINEAR)
def test_memory_is_linear_in_tokens_on_cuda(kernel):
    if kernel == "xformers":
        pytest.importorskip("xformers")
    assert growth(kernel, (2048, 4096, 8192), "cuda", torch.bfloat16) < 2.3


# ---- memory ----------------------------------------------------------------------------------------------


def growth(kernel, tokens, device, dtype):
    """How much more memory the longest takes, forward and backward, than the one of half its length."""
    peaks = []
    for count in tokens:
        q, k, v = (
            torch.randn(1, count, 2, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        mask = torch.ones(1, count, dtype=torch.bool, device=device)

        def call(given=(q, k, v, mask)):
            attention(*given, kernel).sum().backward()

        call()
        peaks.append(peak_memory(call, device))
    return peaks[-1] / peaks[-2]


def test_memory_grows_with_tokens_in_sdpa_and_with_their_square_in_matmul():
    tokens = (1024, 2048)
    assert growth("sdpa", tokens, "cpu", torch.float32) < 2.2
    assert growth("flash", tokens, "cpu", torch.float32) < 2.2
    assert growth("matmul", tokens, "cpu", torch.float32) > 3.5


# ---- what cannot run -------------------------------------------------------------------------------------


def test_unknown_kernel_names_the_choices():
    with pytest.raises(ValueError, match="sdpa"):
        attention(*inputs(), kernel="flash3")


@pytest.mark.parametrize("kernel", ["efficient", "cudnn", "flex"])
def test_a_kernel_the_machine_lacks_says_so_once_and_gives_way(kernel):
    module._warn_once.cache_clear()
    given = inputs()
    with pytest.warns(UserWarning, match=f"{kernel}.*using PyTorch's attention") as caught:
        out = attention(*given, kernel)
    assert len(caught) == 1
    assert torch.equal(out, attention(*given, "auto"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*given, kernel)


BROKEN = {  # what lies in xformers/__init__.py and xformers/ops.py -> the line that says so
    "missing": (None, None, "xformers is missing"),
    "import": ("", "raise ImportError('libcudart.so.12: cannot open')", r"cannot be loaded \(libcudart"),
    "binary": (
        "",
        "raise OSError('_C.so: undefined symbol: _ZN3c10')",
        r"cannot be loaded \(_C.so: undefined",
    ),
    "cuda": ("", "raise RuntimeError('built for CUDA 12')", r"cannot be loaded \(built for CUDA"),
    "kept": (
        "class _cpp_lib: _cpp_library_load_exception = OSError('another PyTorch')",
        "memory_efficient_attention = None",
        r"cannot be loaded \(another PyTorch",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_missing_or_broken_xformers_is_one_line_and_sdpa(case, tmp_path, monkeypatch):
    top, ops, expected = BROKEN[case]
    package = tmp_path / "xformers"
    package.mkdir()
    missing = "raise ModuleNotFoundError('No module named xformers', name='xformers')"
    (package / "__init__.py").write_text(missing if top is None else top)  # found before an installed one
    (package / "ops.py").write_text(ops or "")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    module._missing.cache_clear(), module._warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match=expected) as caught, torch.no_grad():
            outputs = [attention(*inputs(), "xformers") for _ in range(2)]
        assert len(caught) == 1 and str(caught[0].message).endswith("; using PyTorch's attention")
        assert torch.equal(outputs[1], attention(*inputs(), "sdpa"))
    finally:
        module._missing.cache_clear(), module._warn_once.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
            del sys.modules[name]


@pytest.mark.slow
def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    given = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel in ("sdpa", "flash", "matmul", "cudnn"):
            compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*given, kernel).double(), reference(*given), **EXACT)


def test_sdpa_is_pytorchs():
    q, k, v, _ = inputs(masked=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert torch.equal(
        attention(*inputs(masked=False), "sdpa"), F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    )
