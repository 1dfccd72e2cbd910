"""A training step gone through without memory or arithmetic: what it holds, what it computes, what it moves.

The real network, loss, optimisers and averages run on fake tensors (shapes without data), so that whatever they do
is counted as it is: no formula to keep in step with the code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from diffusionfm import optim
from diffusionfm.ema import PowerEMA, widths_of
from diffusionfm.settings import TrainerConfig

aten = torch.ops.aten
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
Work = tuple[float, float]  # FLOPs and bytes of one operation


@dataclass
class Step:
    """Of one training step on one process, in bytes and FLOPs; state is what stays from step to step.

    weights, gradients, optimizer, averages: of the trained parameters. peak: the most that a step holds at a time
    beyond weights, optimizer and averages. activations: the same without gradients. update: the most that the
    optimisers hold while they work, beyond all that and the gradients. passes, updating: the operations of forward and
    backward of one piece, and of optimisers and averages.
    """

    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    peak: int = 0
    activations: int = 0
    largest_block: int = 0
    update: int = 0
    passes: list[Work] = field(default_factory=list)
    updating: list[Work] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Of forward and backward of one piece."""
        return sum(flops for flops, _ in self.passes)


class Trace(TorchDispatchMode):
    """Counts storages made since it was entered, until they are freed, and the work of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_without_gradients = 0
        self.known: dict[int, Any] = {}
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        old = {id(x.untyped_storage()) for x in given}
        new = [x for x in made if id(x.untyped_storage()) not in old]
        for tensor in new:
            self.see(tensor)
        if new or func._schema.is_mutable:
            count = FLOPS.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.work.append((float(flops), float(sum(map(_bytes, [*given, *(new or made)])))))
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        if id(storage) in self.known:
            return
        key, size = id(storage), storage.nbytes()
        self.known[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self._note()

    def take_gradient(self, gradient: Tensor) -> None:
        """Say that a tensor, counted already, is a gradient that stays."""
        self.gradients += gradient.untyped_storage().nbytes()

    def _note(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.gradients)

    def _free(self, key: int, size: int) -> None:
        if self.known.pop(key, None) is not None:
            self.live -= size


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def trace_step(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    cfg: TrainerConfig,
    *,
    bf16: bool,
    gpu: bool,
) -> Step:
    """Go through one training step of the network that `build` gives; `loss_of` runs it and returns the loss.

    bf16: under autocast. gpu: with the normalisation in one operation, as CUDA has it and a CPU has not.
    """
    with FakeTensorMode():
        network = build().train()
        parameters = optim.trainable({"network": network})
        step = Step(sum(p.numel() for p in network.parameters()), sum(_bytes(p) for p in parameters.values()))
        step.largest_block = max(
            (sum(map(_bytes, layer.parameters())) for m in network.modules() for layer in _blocks(m)),
            default=0,
        )
        with _cuda_norm() if gpu else nullcontext(), Trace() as trace:
            hooks = [
                p.register_post_accumulate_grad_hook(lambda p: trace.take_gradient(p.grad))
                for p in parameters.values()
            ]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(network)
            loss.float().backward()
        for hook in hooks:
            hook.remove()
        step.gradients, step.peak, step.activations = (
            trace.gradients,
            trace.peak,
            trace.peak_without_gradients,
        )
        step.passes = trace.work
        _trace_update(step, network, parameters, cfg)
    return step


def _trace_update(
    step: Step, network: nn.Module, parameters: dict[str, nn.Parameter], cfg: TrainerConfig
) -> None:
    averages = [PowerEMA(parameters, width) for width in widths_of(cfg.ema)]
    step.averages = len(averages) * sum(p.numel() * 4 for p in parameters.values())
    optimizers = optim.build_optimizers({"network": network}, cfg.optimizer, cfg.lr, cfg.weight_decay)
    with Trace() as trace:
        for optimizer in optimizers.values():
            optimizer.step()
        for average in averages:
            average.update(1)
        step.optimizer = trace.live  # made in the first step, and kept
    step.update, step.updating = max(0, trace.peak - trace.live), trace.work


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList):
        yield from module


# ---- a GPU's operations on a machine without one -----------------------------------------------------------------


@contextmanager
def _cuda_norm() -> Iterator[None]:
    """F.rms_norm as CUDA's single operation, which keeps its input and one number a row.

    By name, as a mode of torch's would not reach what checkpointing computes again in the backward pass.
    """

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _RMSNorm.apply(x, weight)

    before, F.rms_norm = F.rms_norm, norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.rms_norm = before


class _RMSNorm(torch.autograd.Function):
    """The shapes of torch.rms_norm and its backward; of the values, nothing is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), weight)
        return torch.neg(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, _, weight = ctx.saved_tensors
        return torch.mul(x, grads[0]), None if weight is None else torch.empty_like(weight)
