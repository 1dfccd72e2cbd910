"""What training costs: FLOPs, the share of the machine's matrix rate that they reach, and energy."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

WATTS_A_CORE = 10.0  # of a busy core with its share of memory and board, where nothing measures it
POWERCAP = Path("/sys/class/powercap")


def count_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products, convolutions and attention in `call()`, a backward included.

    A multiplication and an addition count as two. Works on the meta device too.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s that square matrix products reach on the device in `dtype`, now, in about `seconds`.

    What a model's rate is divided by to give its utilisation: measured, so that it means something on any machine.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    _wait(device)
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not done:
        torch.mm(a, a, out=out)
        _wait(device)
        done += 1
    spent = time.perf_counter() - began
    return done * 2.0 * size**3 / spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Energy:
    """Joules that this process's share of the machine used since the last reading; `method` says how they are known.

    nvml: the GPU's own counter. rapl: the CPU packages' counters, read by one process a machine. estimate: threads
    x 10 W x time, a guess that is always there.
    """

    def __init__(self, device: torch.device, local_rank: int = 0) -> None:
        self.device, self.reads_machine = device, local_rank == 0
        self.watts = WATTS_A_CORE * torch.get_num_threads()
        self.nvml = _nvml_counter(device) if device.type == "cuda" else None
        self.zones = _rapl_zones() if self.nvml is None and device.type != "cuda" else []
        self.method = (
            "nvml: the GPU alone"
            if self.nvml
            else "rapl: the CPU packages"
            if self.zones
            else f"estimate: {WATTS_A_CORE:g} W a thread"
            + ("; the GPU is not counted (pip install nvidia-ml-py)" if device.type == "cuda" else "")
        )
        self.time = time.perf_counter()
        self.before = self._counters()

    def read(self) -> float:
        """Joules since the last call, or since the start."""
        now, counters = time.perf_counter(), self._counters()
        spent, self.time = now - self.time, now
        if not counters:
            return 0.0 if self.zones else self.watts * spent
        # a RAPL counter starts again from 0 at its range
        ranges = [limit for _, limit in self.zones] or [0.0]
        pairs = zip(self.before, counters, ranges, strict=True)
        joules = sum(after - before + (limit if after < before else 0.0) for before, after, limit in pairs)
        self.before = counters
        return joules

    def _counters(self) -> list[float]:
        if self.nvml is not None:
            return [self.nvml()]
        return [_joules(zone / "energy_uj") for zone, _ in self.zones] if self.reads_machine else []


def _nvml_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the joules a CUDA device has used; None where NVML or its counter is missing."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl_zones() -> list[tuple[Path, float]]:
    """The CPU packages whose energy counters can be read, each with the joules at which it starts again."""
    zones = []
    for zone in sorted(POWERCAP.glob("intel-rapl:[0-9]")):
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue  # psys, the whole machine, has the packages within it
            _joules(zone / "energy_uj")
            zones.append((zone, _joules(zone / "max_energy_range_uj")))
        except OSError:
            return []
    return zones


def _joules(path: Path) -> float:
    """The joules in a file of microjoules."""
    return int(path.read_text()) / 1e6
