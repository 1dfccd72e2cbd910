"""Optimisers and their schedule: AdamW, or Muon for block matrices and AdamW for the rest; a WSD rate."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusionfm.muon import Muon


def trainable(networks: dict[str, nn.Module], objective: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by `network/parameter` name, tied ones once.

    Raises ValueError for 16-bit ones: their updates round away, so masters are fp32 and autocast does the
    rest; and for parameters of the objective outside the networks that require a gradient: they would be
    left behind.
    """
    found, seen = {}, set()
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{name}/{key} is {parameter.dtype}: train fp32 masters (network.float()), precision=bf16"
                )
            seen.add(id(parameter))
            found[f"{name}/{key}"] = parameter
    if not found:
        raise ValueError("nothing to train: no parameter of objective.networks() requires a gradient")
    strays = (
        [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in seen]
        if objective
        else []
    )
    if strays:
        raise ValueError(
            f"{strays[0]} of {type(objective).__name__} requires a gradient but is in none of its "
            "networks(): add its network there, or freeze it with requires_grad_(False)"
        )
    return found


def build_optimizers(
    networks: dict[str, nn.Module],
    kind: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    scales: dict[str, float] | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """Optimisers by name: {"adamw"} or {"muon", "adamw"}. Weight decay falls on matrices and filters only.

    scales: network name -> factor on the learning rate of its parameters, 1 where it is not named.

    Muon (Jordan et al. 2024) orthogonalises the update of every matrix inside a block; its step is scaled
    to AdamW's RMS (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"trainer.optimizer is adamw or muon, not {kind!r}")
    named = trainable(networks)
    if unknown := set(scales or {}) - set(networks):
        raise ValueError(
            f"trainer.lr_scale names {', '.join(sorted(unknown))}; this trains {', '.join(networks)}"
        )
    parameters = list(named.values())
    scale = {id(p): (scales or {}).get(key.partition("/")[0], 1.0) for key, p in named.items()}
    blocks = (
        {id(p) for network in networks.values() for p in _block_matrices(network)}
        if kind == "muon"
        else set()
    )
    matrices = [p for p in parameters if id(p) in blocks]
    rest = [p for p in parameters if id(p) not in blocks]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if kind == "muon":
        if not matrices:
            raise ValueError(
                "trainer.optimizer=muon needs Linear layers inside a ModuleList of blocks; use adamw"
            )
        optimizers["muon"] = Muon(_by_scale(matrices, scale), lr, weight_decay)
    groups = _by_scale([p for p in rest if p.ndim >= 2], scale, weight_decay=weight_decay)
    groups += _by_scale([p for p in rest if p.ndim < 2], scale, weight_decay=0.0)
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for p in rest)
        optimizers["adamw"] = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)
    return optimizers


def _by_scale(
    parameters: list[nn.Parameter], scale: dict[int, float], **options: float
) -> list[dict[str, Any]]:
    """Parameter groups, one a factor on the learning rate, for `set_lr` to heed."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(scale[id(parameter)], []).append(parameter)
    return [{"params": some, "lr_scale": factor, **options} for factor, some in found.items()]


def _block_matrices(network: nn.Module) -> Iterator[Tensor]:
    """Weights of Linear layers that live in a ModuleList: embeddings and heads stand outside the blocks."""
    for blocks in network.modules():
        if isinstance(blocks, nn.ModuleList):
            for layer in blocks.modules():
                if isinstance(layer, nn.Linear):
                    yield layer.weight


def decay_start(steps: int, decay_fraction: float) -> int:
    """The step at which the learning rate begins to fall; until then a run's length does not matter."""
    return steps - round(steps * decay_fraction)


def wsd(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Factor in (0, 1] on the learning rate of step 0 <= step < steps: linear up, flat, linear towards 0.

    Warm-up-stable-decay (Hu et al. 2024, arXiv 2404.06395): only the last part depends on `steps`.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    start = decay_start(steps, decay_fraction)
    fall = (steps - step) / (steps - start + 1) if step >= start else 1.0
    return min(rise, fall)


def set_lr(optimizers: dict[str, torch.optim.Optimizer], lr: float) -> None:
    """Give every group of every optimiser this learning rate, times the group's own factor."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(
    optimizers: dict[str, torch.optim.Optimizer], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimisers' moments as flat tensors, `network/parameter:moment`, ready for safetensors."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        f"{names[id(parameter)]}:{moment}": value
        for optimizer in optimizers.values()
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: dict[str, torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave, whole, on each parameter's device and sharded as it is."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        moments.setdefault(name, {})[moment] = _placed(value, parameters.get(name))
    for optimizer in optimizers.values():
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {i: moments[names[id(p)]] for i, p in enumerate(ordered) if names[id(p)] in moments}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _placed(value: Tensor, parameter: Tensor | None) -> Tensor:
    """A moment sharded as its parameter is; a step count stays as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
