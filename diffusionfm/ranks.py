"""What the processes of one training run tell each other: their number, and tensors gathered with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rank() -> int:
    """This process's number, 0 when there is only one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """x (b, ...) of every rank, of equal shape, joined in rank order: (ranks * b, ...).

    Gradients flow back: a rank's x gets what the losses of all ranks have for it, summed. Averaging over ranks, as
    data-parallel training does, then gives the gradient of the mean of their losses.
    """
    return _Gather.apply(x) if torch.distributed.is_initialized() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)  # gloo has no reduce_scatter of tensors
        return gradient.chunk(torch.distributed.get_world_size())[rank()]
