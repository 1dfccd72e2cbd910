"""What keeps one bad batch from spoiling a run: spikes are told from noise, and the batch is kept to look at."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffusionfm.runtime import Batch

MEMORY = 0.98  # the running mean and deviation look back over some 50 steps
FIRST_JUDGED = 50  # accepted steps that the statistics need before they judge one
SPIKES_IN_A_ROW = 5  # so many skipped steps one after the other are no accident: the run stops
LEAST_DEVIATION = 0.1  # of the mean: a value within that share of it, times the limit, is never a spike
MOST_DUMPS = 8  # the newest so many bad batches are kept
MOST_BYTES = 64 * 2**20  # of each batch, the first samples that fit into so much


@dataclass
class SpikeGuard:
    """Tells from running statistics whether a step's loss or gradient norm is out of all proportion.

    limit: a value so many running standard deviations above the running mean is a spike; 0 never finds any. Values
    of skipped steps do not enter the statistics. It decides from numbers that are equal on all ranks and keeps its
    state as plain floats, so ranks agree and a resumed run decides as an unbroken one (`state`, `load`).
    """

    limit: float
    steps: int = 0  # accepted so far
    row: int = 0  # skipped one after the other
    skipped: int = 0  # in all
    mean: dict[str, float] = field(default_factory=dict)
    variance: dict[str, float] = field(default_factory=dict)

    def judge(self, values: dict[str, float]) -> str:
        """Take in a step's values; '' to go on, else which of them is a spike, in words: skip the step."""
        for name, value in values.items():
            bound = self._bound(name)
            if bound is not None and value > bound:
                self.row, self.skipped = self.row + 1, self.skipped + 1
                return f"{name} {value:.4g} is far above its running mean {self.mean[name]:.4g}"
        self.row = 0
        self.steps += 1
        share = max(1 - MEMORY, 1 / self.steps)  # a plain mean until there is enough to forget
        for name, value in values.items():
            mean = self.mean.get(name, value)
            step = share * (value - mean)
            self.mean[name] = mean + step
            self.variance[name] = (1 - share) * (self.variance.get(name, 0.0) + step * (value - mean))
        return ""

    def _bound(self, name: str) -> float | None:
        if not self.limit or self.steps < FIRST_JUDGED:
            return None
        mean = self.mean[name]
        return mean + self.limit * max(self.variance[name] ** 0.5, LEAST_DEVIATION * abs(mean))

    def state(self) -> dict[str, Any]:
        """What `load` takes back, as JSON."""
        return {name: value for name, value in asdict(self).items() if name != "limit"}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken; an empty one changes nothing."""
        for name, value in state.items():
            setattr(self, name, value)


def dump_batch(folder: Path, batch: Batch, rank: int, facts: dict[str, Any]) -> None:
    """Keep this rank's batch in `folder`: tensors as rankR.safetensors, lists and facts as rankR.json.

    No more than the first samples that fit into 64 MiB; of the folders beside this one the newest 8 stay. Plain
    tensors and plain JSON: `safetensors.torch.load_file` reads the one, anything the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    most = max((len(value) for value in batch.values() if isinstance(value, list)), default=0)
    rows = max((len(v) for v in tensors.values() if v.ndim), default=most)
    size = sum(v.numel() * v.element_size() for v in tensors.values())
    kept = rows if size <= MOST_BYTES else int(rows * MOST_BYTES / size)
    cut = {k: (v[:kept] if v.ndim else v).detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(cut, folder / f"rank{rank}.safetensors")
    lists = {name: value[:kept] for name, value in batch.items() if isinstance(value, list)}
    record = {**facts, "samples": rows, "kept": kept, **lists}
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    (folder / f"rank{rank}.json").write_text(text + "\n", encoding="utf-8")
    if rank == 0:
        for old in sorted(folder.parent.glob("step_*"))[:-MOST_DUMPS]:
            shutil.rmtree(old, ignore_errors=True)
