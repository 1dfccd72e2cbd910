"""What GPUs can do, as their makers say, and what share of that a training step may count on. Imports no torch.

Peak rates are those of the data sheets: bf16 matrix products without sparsity and with fp32 sums, memory bandwidth,
the link to the other GPUs of a machine one way, and the board's power. A GPU in use reaches less: `ACHIEVED` says how
much of each a prediction counts on, `MACHINE` how many GPUs a machine has, and `NETWORK` what joins machines.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
ACHIEVED = {"matrix": 0.70, "memory": 0.80, "link": 0.70}
MACHINE = 8  # GPUs a machine
LAUNCH = 5e-6  # seconds that an operation takes at least, uncompiled
FUSED = 0.4  # of the memory traffic of element-wise operations is left when a step is compiled
RESERVED = 1.5 * GIB  # of a GPU's memory go to the driver, NCCL and workspaces; 0 on a CPU
FRAGMENTED = 1.08  # what the allocator holds, over what tensors need
OVERHEAD = 1.3  # power drawn by a whole machine and its cooling, over that of its GPUs


@dataclass(frozen=True)
class Gpu:
    """bf16: FLOP/s. memory: bytes. bandwidth, link, network: bytes/s, the last two a GPU and one way. watts."""

    name: str
    bf16: float
    memory: float
    bandwidth: float
    link: float
    network: float
    watts: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 312e12, 40 * GIB, 1.555e12, 300e9, 25e9, 400),
        Gpu("a100-80", 312e12, 80 * GIB, 2.039e12, 300e9, 25e9, 400),
        Gpu("h100", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9, 700),
        Gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 700),
        Gpu("b200", 2250e12, 180e9, 7.7e12, 900e9, 50e9, 1000),
        Gpu("rtx-4090", 165e12, 24 * GIB, 1.008e12, 25e9, 3e9, 450),
        Gpu("mi300x", 1307e12, 192e9, 5.3e12, 448e9, 50e9, 750),
    )
}
KNOWN = (*GPUS, "cpu")


def check_gpu(name: str) -> str:
    """The name of a GPU in the table, or "cpu", which is measured; ValueError lists them."""
    if name.lower() not in KNOWN:
        raise ValueError(f"no rates for the GPU {name!r}: those known are {', '.join(KNOWN)}")
    return name.lower()
