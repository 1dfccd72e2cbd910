"""Parameters, gradients, averages and optimiser state cut over the ranks: FSDP2 and HSDP, for any objective.

FSDP2 (torch's fully_shard) replaces each parameter by a DTensor of which a rank holds some rows. Everything outside
the step sees a model as it is on one process: `whole` puts full weights back for sampling, validation and export, and
a checkpoint, one safetensors file a rank and network beside the same state.json, is read into whole tensors again. So
one written by 4 ranks loads on 2, on 1, or without sharding, and the other way round, and nothing is unpickled.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusionfm import checkpoint
from diffusionfm.runtime import gather_json, repeated_blocks


class Sharding:
    """An objective cut over the ranks; make it once the weights are loaded and before the optimisers are built.

    kind: "fsdp" cuts over all ranks. "hsdp" cuts over the ranks of a machine and keeps a copy on each machine, which
    sends only gradients between them.
    Frozen parameters and scalars stay whole on every rank. Raises ValueError where ranks and machines do not fit.
    """

    def __init__(self, kind: str, objective: nn.Module, device: torch.device) -> None:
        self.objective, self.device, self.mesh = objective, device, make_mesh(kind, device)
        trained = [p for p in objective.parameters() if p.requires_grad]
        self.scalars = [p for p in trained if p.ndim == 0]
        whole = {p for p in objective.parameters() if not p.requires_grad or p.ndim == 0}
        # torch warns of in-place operations on a block's output, of which our networks have none
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for unit in units(objective):
            fully_shard(unit, mesh=self.mesh, ignored_params=whole)
            for method in ways_in(unit):
                register_fsdp_forward_method(unit, method)
        fully_shard(objective, mesh=self.mesh, ignored_params=whole)

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Average what FSDP2 leaves whole, scale all gradients to a norm of at most `limit`; the norm before."""
        for scalar in self.scalars:
            if scalar.grad is not None:
                dist.all_reduce(scalar.grad)
                scalar.grad /= dist.get_world_size()
        grads = [p.grad for p in parameters if p.grad is not None]
        cut = [g.to_local() for g in grads if isinstance(g, DTensor)]
        full = [g for g in grads if not isinstance(g, DTensor)]
        device = self.mesh.device_type
        total = sum((g.float().square().sum() for g in cut), torch.zeros((), device=device))
        dist.all_reduce(total, group=self.mesh.get_group(self.mesh.ndim - 1))
        norm = sum((g.float().square().sum() for g in full), total).sqrt()
        torch._foreach_mul_([*cut, *full], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextmanager
    def whole(self, keep: bool) -> Iterator[None]:
        """The objective as if it had never been cut: plain parameters, its own classes, no hooks; all ranks at once.

        Only ranks that `keep` the full weights may use it inside the `with` block; the others just help to gather.
        """
        plain: dict[int, nn.Parameter] = {}
        undo: list[Callable[[], Any]] = []
        for module in self.objective.modules():
            for name, parameter in module._parameters.items():
                if not isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in plain:
                    full = parameter.detach().full_tensor()
                    kept = full if keep else torch.empty(0)
                    plain[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
                undo.append(_swap(module._parameters, name, plain[id(parameter)]))
            undo.append(_undress(module))
        try:
            yield
        finally:
            for put_back in reversed(undo):
                put_back()

    def gathered(self, rows: dict[str, Tensor], like: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors on the CPU of ranks that `keep` them, from each rank's rows; all ranks at once."""
        found = {}
        for name, value in self.cut_as(rows, like).items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                found[name] = full.cpu()
        return found

    def cut_as(self, rows: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each rank's rows as one sharded tensor, laid out as the tensor of that name in `like`."""
        return {name: _joined(value, like[name]) for name, value in rows.items()}

    def save(self, folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Write a checkpoint together: each rank its rows, the first also what is whole and state.json.

        The folder must lie where every rank can write. Raises CheckpointError on all ranks when one could not.
        """
        shard, shards = self.mesh.get_local_rank(self.mesh.ndim - 1), self.mesh.size(self.mesh.ndim - 1)
        writes = self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0
        aside = folder.with_name(f".{folder.name}.partial")
        files: dict[str, Any] = {}
        self._together(lambda: str(checkpoint.begin(folder)) if dist.get_rank() == 0 else "")
        own = {
            checkpoint.shard_name(name, shard, shards): {
                key: local(value) for key, value in group.items() if shard == 0 or isinstance(value, DTensor)
            }
            for name, group in tensors.items()
        }
        for found in self._together(lambda: checkpoint.write_files(aside, own) if writes else {}):
            files |= found
        self._together(lambda: checkpoint.finish(folder, files, state) if dist.get_rank() == 0 else None)

    def _together(self, call: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `call()`, JSON; CheckpointError on all of them when it raised on one."""
        try:
            outcome: list[Any] = [call(), ""]
        except checkpoint.CheckpointError as error:
            outcome = [None, str(error)]
        outcomes = gather_json(outcome, self.device)
        faults = [text for _, text in outcomes if text]
        if faults:
            raise checkpoint.CheckpointError(faults[0])
        return [result for result, _ in outcomes]


def make_mesh(kind: str, device: torch.device) -> DeviceMesh:
    """The ranks as ("shard",), or for "hsdp" as ("replicate", "shard"): machines by ranks of a machine."""
    ranks, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if kind == "fsdp" or here == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    if ranks % here:
        raise ValueError(
            f"trainer.sharding=hsdp needs as many processes on each machine: {ranks} do not divide into {here}s"
        )
    return init_device_mesh(device.type, (ranks // here, here), mesh_dim_names=("replicate", "shard"))


def units(objective: nn.Module) -> list[nn.Module]:
    """What is gathered for itself, inner units before the ones around them: the blocks, and parts of them with
    another way in than a call. None when a parameter lies in two places: then all is gathered at once."""
    places = [id(p) for m in objective.modules() for p in m._parameters.values() if p is not None]
    if len(set(places)) < len(places):
        return []
    found = [
        part
        for block in repeated_blocks(objective)
        for part in reversed([*block.modules()])
        if (part is block or ways_in(part)) and any(p.requires_grad for p in part.parameters())
    ]
    return list(dict.fromkeys(found))


def ways_in(module: nn.Module) -> list[str]:
    """The public methods that a class of ours adds to forward; they may use its parameters from outside."""
    kind = type(module)
    if isinstance(module, FSDPModule):
        kind = kind.__mro__[2]
    if kind.__module__.startswith("torch."):
        return []
    return [
        name for name, value in vars(kind).items() if callable(value) and name[0] != "_" and name != "forward"
    ]


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in place; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def rows_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a whole tensor that is cut as `like` is; the tensor itself where `like` is whole."""
    if not isinstance(like, DTensor):
        return value
    cut = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local()


def _swap(table: dict[str, Any], name: str, value: Any) -> Callable[[], Any]:
    before, table[name] = table[name], value
    return lambda: table.__setitem__(name, before)


def _joined(rows: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _undress(module: nn.Module) -> Callable[[], Any]:
    """Take FSDP2's class, hooks and wrapped methods off a module; the result puts them on again."""
    kind, before = type(module), vars(module).copy()
    touched = ["_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks"]
    for name in touched:
        hooks = before[name]
        module.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp(hook))
    if isinstance(module, FSDPModule):
        touched += ways_in(module)
        for name in ways_in(module):
            module.__dict__.pop(name, None)
        module.__class__ = kind.__mro__[2]

    def put_back() -> None:
        module.__class__ = kind
        module.__dict__.update({name: before[name] for name in touched if name in before})

    return put_back


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
