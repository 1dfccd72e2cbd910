"""What a denoiser run will need: memory a GPU, FLOPs a picture, pictures a second, GPU-hours and energy.

The step itself is gone through without data (`trace`): parameters, memory and FLOPs are counts. Times are a roofline
over those counts: each operation takes as long as its arithmetic or its memory traffic, whichever is longer, at the
rates of `gpus`, plus what of the talk between GPUs does not hide behind it. Axes: b batch, c channels, y x, l tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusionfm import cost, gpus
from diffusionfm.checks import check_safetensors, read_json
from diffusionfm.config import check_options
from diffusionfm.data.buckets import pictures_of
from diffusionfm.devices import has_fast_bf16
from diffusionfm.features import EMPTY_PROMPT
from diffusionfm.gpus import ACHIEVED, GIB, GPUS, MACHINE, Gpu
from diffusionfm.objectives import FlowMatching
from diffusionfm.trace import Step, Work, trace_step
from diffusionfm.transformer import DiffusionTransformer
from diffusionfm.unet import DiffusionUNet

NETWORKS = {"transformer": DiffusionTransformer, "unet": DiffusionUNet}
FP32_SHARE = 1 / 16  # of a GPU's bf16 rate that fp32 matrix products reach without TF32


@dataclass
class Shapes:
    """What one piece of one rank's batch looks like: `micro` latents (c, side, side) and prompts of `text_tokens`."""

    pictures: int  # of a step, over all ranks
    micro: int
    channels: int
    side: int
    tokens: int
    text_dim: int
    text_tokens: int


@dataclass
class Plan:
    """A prediction. memory: bytes on each GPU by what they are for, `total` what to have free. seconds: of a step."""

    gpu: str
    gpus: int
    sharding: str
    precision: str
    steps: int
    shapes: Shapes
    parameters: int
    memory: dict[str, float]
    capacity: float
    flops_a_picture: float
    seconds: dict[str, float]
    images_per_s: float
    utilisation: float
    gpu_hours: float
    kwh: float
    rates: dict[str, float]
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.capacity

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return {**asdict(self), "fits": self.fits}


def predict(cfg: Any, count: int, gpu: str, batch: int | None = None) -> Plan:
    """Plan a run of train/denoiser.py: `cfg` is its DenoiserConfig, `count` how many GPUs, `batch` pictures a step.

    Raises ValueError for a GPU without rates, a batch that does not divide, and a config that builds no network.
    """
    kind = gpus.check_gpu(gpu)
    if count < 1 or (count > MACHINE and count % MACHINE):
        raise ValueError(f"--gpus is 1 to {MACHINE}, or machines of {MACHINE}: a multiple of it, not {count}")
    if cfg.kind not in NETWORKS:
        raise ValueError(f"kind must be one of {', '.join(NETWORKS)}, got {cfg.kind!r}")
    notes: list[str] = []
    shapes = shapes_of(cfg, count, batch, notes)
    if cfg.objective.get("tune_text"):
        notes.append("the text encoder learns along (objective.tune_text): its training is not counted")
    bf16 = cfg.trainer.precision == "bf16" or (
        cfg.trainer.precision == "auto" and (kind != "cpu" or has_fast_bf16(torch.device("cpu")))
    )
    step = trace_step(
        lambda: build(cfg, shapes, kernel="auto" if kind == "cpu" else "sdpa"),
        lambda network: loss_of(network, shapes),
        cfg.trainer,
        bf16=bf16,
        gpu=kind != "cpu",
    )
    rates = measure_cpu(bf16, count) if kind == "cpu" else GPUS[kind]
    frozen = {name: encoder_bytes(getattr(cfg, name), notes) for name in ("vae", "text_encoder")}
    memory = memory_of(step, cfg.trainer, count, sum(frozen.values()), on_gpu=kind != "cpu")
    reads = 0.0 if (Path(cfg.data.shards) / EMPTY_PROMPT).is_file() else frozen["text_encoder"] / 4
    seconds = seconds_of(step, cfg.trainer, count, rates, bf16, reads * shapes.micro * shapes.text_tokens * 2)
    total = sum(seconds.values())
    hours = cfg.trainer.steps * total * count / 3600
    flops = step.flops / shapes.micro
    return Plan(
        gpu=kind,
        gpus=count,
        sharding=cfg.trainer.sharding if count > 1 else "none",
        precision="bf16" if bf16 else "fp32",
        steps=cfg.trainer.steps,
        shapes=shapes,
        parameters=step.parameters,
        memory=memory,
        capacity=rates.memory,
        flops_a_picture=flops,
        seconds=seconds,
        images_per_s=shapes.pictures / total,
        utilisation=flops * shapes.pictures / total / count / _matrix_rate(rates, bf16),
        gpu_hours=hours,
        kwh=hours * rates.watts * gpus.OVERHEAD / 1000,
        rates={key: value for key, value in asdict(rates).items() if key != "name"},
        notes=notes,
    )


# ---- the run's shapes --------------------------------------------------------------------------------------------


def shapes_of(cfg: Any, count: int, batch: int | None, notes: list[str]) -> Shapes:
    """The shapes of a step on `count` ranks; what is assumed goes to `notes`. ValueError where it does not divide."""
    defaults = NETWORKS[cfg.kind]().config
    sizes: dict[str, Any] = {
        "in_channels": _told(cfg.vae, "latent_channels"),
        "text_dim": _told(cfg.text_encoder, "hidden_size", "d_model"),
    }
    for key, told in sizes.items():
        sizes[key] = cfg.denoiser.get(key, told)
        if sizes[key] is None:
            sizes[key] = defaults[key]
            notes.append(f"denoiser.{key} is taken to be {sizes[key]}: neither the config nor a folder says")
    patch = cfg.denoiser.get("patch", defaults.get("patch", 1))
    buckets, trainer = cfg.data.buckets, cfg.trainer
    pictures = batch or trainer.batch_size
    if buckets is None:
        side = cfg.denoiser.get("grid", defaults["grid"]) * patch
    else:
        side = max(buckets.sides) // buckets.patch * patch
        square = (max(buckets.sides),) * 2
        pictures = pictures_of(square, buckets, pictures)
        notes.append(f"every picture is taken to be a square of the largest side; {pictures} are a step")
    micro = replace(trainer, batch_size=pictures).pieces(count)
    text_tokens = cfg.objective.get("text_multiple", 32)
    notes.append(f"prompts are taken to be {text_tokens} tokens long (objective.text_multiple)")
    tokens = (side // patch) ** 2
    return Shapes(pictures, micro, sizes["in_channels"], side, tokens, sizes["text_dim"], text_tokens)


def build(cfg: Any, shapes: Shapes, kernel: str) -> nn.Module:
    """The denoiser of a config; ValueError for arguments it does not know."""
    arguments = {"in_channels": shapes.channels, "text_dim": shapes.text_dim, **cfg.denoiser}
    if arguments.get("attention_kernel", "auto") == "auto":
        arguments["attention_kernel"] = kernel
    check_options("denoiser", arguments, NETWORKS[cfg.kind])
    network = NETWORKS[cfg.kind](**arguments)
    if cfg.checkpointing:
        network.enable_gradient_checkpointing()
    return network


def loss_of(network: nn.Module, shapes: Shapes) -> Tensor:
    """The training loss of a piece, from its latents on: prompts are read by a frozen network before."""
    objective = FlowMatching(network, nn.Identity(), None)  # type: ignore[arg-type]
    b = shapes.micro
    latent = torch.randn(b, shapes.channels, shapes.side, shapes.side)
    text = torch.randn(b, shapes.text_tokens, shapes.text_dim)
    mask = torch.ones(b, shapes.text_tokens, dtype=torch.bool)
    return objective.error(latent, torch.randn_like(latent), torch.rand(b), text, mask).mean()


def _told(folder: str, *keys: str) -> int | None:
    """What an encoder's config.json says, if it is there."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return next((int(config[key]) for key in keys if key in config), None)


def encoder_bytes(folder: str, notes: list[str]) -> float:
    """Bytes of a frozen encoder in float32, from its safetensors' headers; 0 and a note where there is none."""
    numbers = 0
    for path in Path(folder).glob("*.safetensors"):
        for key, tensor in check_safetensors(path).items():
            if key != "__metadata__":
                size = 1
                for n in tensor["shape"]:
                    size *= n
                numbers += size
    if not numbers:
        notes.append(f"{folder} is not here: its memory and time are not counted")
    return 4.0 * numbers


# ---- memory ------------------------------------------------------------------------------------------------------


def memory_of(step: Step, trainer: Any, count: int, frozen: float, on_gpu: bool) -> dict[str, float]:
    """Bytes on each GPU, by what they are for, and their total.

    Without sharding every rank holds all state, and DDP's buckets hold the gradients once more. With it a rank holds
    its share, and beside it the whole of two blocks while they work. Only the step is counted, not sample grids.
    """
    shards = 1
    if trainer.sharding != "none":
        shards = min(count, MACHINE) if trainer.sharding == "hsdp" else count
    found: dict[str, float] = {
        "weights": step.weights / shards,
        "optimizer": step.optimizer / shards,
        "averages": step.averages / shards,
        "frozen encoders": frozen,
        "gradients": step.gradients / shards,
    }
    # what the most memory is needed for: backward, or the update once all gradients are there
    alone = shards == 1 and trainer.grad_accum == 1
    busy = step.peak - step.gradients if alone else step.activations
    found["activations"] = max(busy, step.update, 0)
    if shards > 1:
        found["gathered blocks"] = 2 * step.largest_block
    elif count > 1:
        found["DDP buckets"] = step.gradients
    if on_gpu:
        found["fragments"] = sum(found.values()) * (gpus.FRAGMENTED - 1)
        found["driver"] = gpus.RESERVED
    return {**found, "total": sum(found.values())}


# ---- time --------------------------------------------------------------------------------------------------------


def seconds_of(
    step: Step, trainer: Any, count: int, gpu: Gpu, bf16: bool, text_flops: float = 0.0
) -> dict[str, float]:
    """Seconds of one step by what they are spent on; `talk` is what of it work does not hide."""
    rate, compiled = _matrix_rate(gpu, bf16) * ACHIEVED["matrix"], bool(trainer.compile)
    work = trainer.grad_accum * _roofline(step.passes, gpu, rate, compiled)
    shared = [
        (flops, moved) for flops, moved in step.updating if flops
    ]  # Muon's, each rank some of the matrices
    own = [(flops, moved) for flops, moved in step.updating if not flops]
    talk, hidden = _talk(step, trainer, count, gpu), work * (2 / 3 if trainer.sharding == "none" else 1)
    return {
        "forward and backward": work,
        "prompts": trainer.grad_accum * text_flops / rate,
        "update": _roofline(shared, gpu, rate, False) / count + _roofline(own, gpu, rate, False),
        "talk": max(0.0, talk - hidden),
    }


def _roofline(work: Iterable[Work], gpu: Gpu, rate: float, compiled: bool) -> float:
    bandwidth, total = gpu.bandwidth * ACHIEVED["memory"], 0.0
    for flops, moved in work:
        if compiled:
            total += max(flops / rate, moved * (1 if flops else gpus.FUSED) / bandwidth)
        else:
            total += max(flops / rate, moved / bandwidth, gpus.LAUNCH)
    return total


def _talk(step: Step, trainer: Any, count: int, gpu: Gpu) -> float:
    """Seconds of the collectives of a step: DDP's all-reduce, or FSDP's two gathers and one scatter a piece."""
    if count == 1:
        return 0.0
    here, machines = min(count, MACHINE), max(1, count // MACHINE)
    link = gpu.link * ACHIEVED["link"]
    # rings through all GPUs cross between machines once, spread over as many network cards as GPUs
    wide = min(gpu.link, here * gpu.network) * ACHIEVED["link"] if machines > 1 else link
    if trainer.sharding == "none":
        return 2 * (count - 1) / count * step.gradients / wide
    if trainer.sharding == "fsdp":
        return trainer.grad_accum * 3 * (count - 1) / count * step.weights / wide
    inside = trainer.grad_accum * 3 * (here - 1) / here * step.weights / link
    return inside + trainer.grad_accum * 2 * (machines - 1) / machines * step.gradients / here / wide


def _matrix_rate(gpu: Gpu, bf16: bool) -> float:
    return gpu.bf16 if bf16 or gpu.name == "cpu" else gpu.bf16 * FP32_SHARE


def measure_cpu(bf16: bool, count: int, seconds: float = 0.3) -> Gpu:
    """What each of `count` processes has of this machine, measured now, as if `ACHIEVED` of a peak had been seen.

    The processes talk by memory."""
    device = torch.device("cpu")
    matrix = cost.matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, seconds) / count
    source = torch.ones(16 * 2**20)
    target, fastest, began = torch.empty_like(source), 1e9, time.perf_counter()
    while time.perf_counter() - began < seconds or fastest == 1e9:
        start = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - start)
    bandwidth = 2 * source.nbytes / fastest / ACHIEVED["memory"] / count
    watts = cost.WATTS_A_CORE * torch.get_num_threads() / count
    return Gpu(
        "cpu", matrix / ACHIEVED["matrix"], _machine_memory() / count, bandwidth, bandwidth / 4, 1e9, watts
    )


def _machine_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# ---- words -------------------------------------------------------------------------------------------------------


def table(plan: Plan, title: str) -> str:
    """The plan as lines for a reader."""
    s, m = plan.shapes, plan.memory
    lines = [
        f"{title} on {plan.gpus} x {plan.gpu}, {plan.precision}, sharding {plan.sharding}",
        f"network      {plan.parameters / 1e6:,.1f} M parameters; {s.tokens:,} tokens a picture, latent "
        f"{s.channels} x {s.side} x {s.side}; {_si(plan.flops_a_picture)}FLOPs a picture, forward and backward",
        f"step         {s.pictures:,} pictures, {s.micro} a GPU at a time",
        "memory       on each GPU",
        *(f"  {name:<18}{value / GIB:>9.3f} GiB" for name, value in m.items()),
        f"  {'of':<18}{plan.capacity / GIB:>9.3f} GiB{'' if plan.fits else '   IT DOES NOT FIT'}",
        "time         of a step",
        *(f"  {name:<22}{value * 1e3:>10.1f} ms" for name, value in plan.seconds.items()),
        f"speed        {plan.images_per_s:,.1f} pictures/s, {plan.utilisation:.0%} of the peak matrix rate",
        f"whole run    {plan.steps:,} steps, {plan.steps * s.pictures:,} pictures: {plan.gpu_hours:,.1f} GPU-hours, "
        f"{plan.gpu_hours / plan.gpus:,.1f} hours, {plan.kwh:,.1f} kWh at {plan.rates['watts']:g} W a GPU "
        f"x {gpus.OVERHEAD}",
        f"rates        {_si(plan.rates['bf16'])}FLOP/s peak, {_si(plan.rates['bandwidth'])}B/s memory, "
        f"{_si(plan.rates['link'])}B/s to a GPU beside, {_si(plan.rates['network'])}B/s to another machine; "
        "counted on: " + ", ".join(f"{share:.0%} of {name}" for name, share in ACHIEVED.items()),
        *(f"note         {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def launch_line(config: str, plan: Plan, overrides: Iterable[str] = ()) -> str:
    """The command that starts the run as planned; where there are several machines, the same on each."""
    words = " ".join(["train/denoiser.py", config, *overrides])
    if plan.gpus == 1:
        return f"python {words}"
    if plan.gpus <= MACHINE and plan.gpu == "cpu":  # accelerate starts several there by MPI alone
        threads = max(1, torch.get_num_threads() // plan.gpus)
        return f"OMP_NUM_THREADS={threads} torchrun --standalone --nproc_per_node {plan.gpus} {words}"
    if plan.gpus <= MACHINE:
        return f"accelerate launch --multi_gpu --num_processes {plan.gpus} {words}"
    return (
        f"torchrun --nnodes {plan.gpus // MACHINE} --nproc-per-node {MACHINE} --rdzv-backend c10d "
        f"--rdzv-endpoint FIRST_MACHINE:29500 {words}"
    )


def _si(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.2f} {letter}"
    return f"{value:,.0f} "
