"""Muon whose orthogonalisation is shared out over the ranks, in fp32 where bf16 products are slow."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusionfm.devices import has_fast_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Muon):
    """torch's Muon with the step scaled to AdamW's RMS, but every rank orthogonalises only its share of the matrices.

    Ranks must hold equal gradients, as they do under DDP, or shards of them, as under FSDP2. Each matrix is worked
    by one rank alone and its update then sent to the others, so the weights are bit for bit those of one process
    that does all. Momentum stays with the parameter, whole or sharded as that is: a checkpoint does not depend on
    the number of ranks. Matrices go from the costliest to the cheapest, one a rank at a time, which bounds the
    memory to as many updates as there are ranks.
    """

    def __init__(
        self, matrices: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float
    ) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; a matrix without a gradient stays as it is."""
        assert closure is None
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            moved.sort(key=lambda p: p.numel() * min(p.shape), reverse=True)
            size = dist.get_world_size() if dist.is_initialized() else 1
            for k, start in enumerate(range(0, len(moved), size)):
                # back and forth, so that no rank always has the costliest of a round
                owners = range(size) if k % 2 == 0 else range(size - 1, -1, -1)
                self._round(moved[start : start + size], owners, group)

    def _round(self, matrices: list[Tensor], owners: Sequence[int], group: dict[str, Any]) -> None:
        """Step at most one matrix a rank, the i-th worked by owners[i]."""
        own, mine = dist.get_rank() if dist.is_initialized() else 0, None
        dtype = torch.bfloat16 if has_fast_bf16(matrices[0].device) else torch.float32
        for i, matrix in enumerate(matrices):
            momentum = self._momentum(matrix, group["momentum"])
            whole = momentum.full_tensor() if isinstance(momentum, DTensor) else momentum
            if owners[i] == own:
                mine = orthogonal(whole.to(dtype), group["ns_steps"], group["eps"])
        for matrix, update in zip(matrices, _exchange(matrices, owners, mine, dtype), strict=True):
            rate = group["lr"] * (0.2 * math.sqrt(max(matrix.shape)))
            if isinstance(matrix, DTensor):
                rows = distribute_tensor(
                    update, matrix.device_mesh, matrix.placements, src_data_rank=None
                )  # cut from what every rank has: nothing is sent
                matrix, update = matrix.to_local(), rows.to_local()
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-rate)

    def _momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Nesterov's look ahead, sharded as the gradient is."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        state["momentum_buffer"].lerp_(matrix.grad, 1 - decay)
        return matrix.grad.lerp(state["momentum_buffer"], decay)


def _exchange(
    matrices: list[Tensor], owners: Sequence[int], mine: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """The updates of a round's matrices, the i-th of which rank owners[i] has as `mine`."""
    if not dist.is_initialized():
        assert mine is not None
        return [mine]
    most = max(matrix.numel() for matrix in matrices)
    device = matrices[0].device
    sent = torch.zeros(most, dtype=dtype, device=device)
    if mine is not None:
        sent[: mine.numel()] = mine.reshape(-1)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    bytes_of = [part.view(torch.uint8) for part in parts]  # gloo knows no bf16
    dist.all_gather(bytes_of, sent.view(torch.uint8))
    # the last round may have fewer matrices than ranks
    pairs = zip(matrices, owners, strict=False)
    return [parts[owner][: matrix.numel()].view(matrix.shape) for matrix, owner in pairs]


def orthogonal(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Near U V^T of a matrix U S V^T, in its own dtype, by Newton-Schulz (Jordan et al. 2024).

    The singular values end up within about 0.7 to 1.2: the quintic's coefficients trade that for speed.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
