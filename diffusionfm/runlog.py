"""What a run folder tells: config, environment, a line a step, a tracker, a progress bar and the ledger."""

import importlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusionfm.checkpoint import write_json, writing
from diffusionfm.config import as_dict, dump_config


class RunLog:
    """The records of one run folder; where `enabled` is False (ranks but the first) it does nothing.

    bar: whether a progress bar is shown."""

    def __init__(
        self,
        run_dir: Path,
        resolved_config: Any,
        tracker: str = "none",
        enabled: bool = True,
        bar: bool = True,
    ) -> None:
        self.run_dir, self.resolved_config, self.enabled = run_dir, resolved_config, enabled
        self.tracker, self.show_bar = tracker, bar
        self.metrics = run_dir / "metrics.jsonl"
        self.file: Any = None
        self.track: Callable[[dict[str, float], int], Any] | None = None
        self.bar: Any = None
        self.closing: list[Callable[[], Any]] = []

    def start(self, step: int, **facts: Any) -> None:
        """Make the folder, record config and environment, and cut the metrics back to `step`."""
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(self.resolved_config, self.run_dir / "config.yaml")
            write_json(self.run_dir / "environment.json", environment() | facts)
            cut_back(self.metrics, step)

    def open(self, step: int, steps: int) -> None:
        """Begin to write lines after `step` of `steps`."""
        if not self.enabled:
            return
        self.file = open(self.metrics, "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        self.closing.append(self.file.close)
        if self.tracker == "tensorboard":
            self._open_tensorboard(step)
        elif self.tracker == "trackio":
            self._open_trackio()
        every = 0.5 if sys.stderr.isatty() else 30.0
        name, off = self.run_dir.name, not self.show_bar
        self.bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=every, disable=off)
        self.closing.append(self.bar.close)

    def _open_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

        def track(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self.track = track
        self.closing.append(board.close)

    def _open_trackio(self) -> None:
        trackio = importlib.import_module("trackio")
        trackio.init(
            project="diffusionfm",
            name=str(self.run_dir),
            config=as_dict(self.resolved_config),
            resume="allow",
        )
        self.track = trackio.log
        self.closing.append(trackio.finish)

    def write(self, line: dict[str, Any], to_board: bool) -> None:
        """Add one step's line; numbers that are not finite become null."""
        if not self.enabled:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with writing(self.metrics):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.track is not None and to_board:
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            self.track(values, line["step"])
        self.bar.set_postfix(
            {"loss": f"{line['loss']:.4f}", "images/s": f"{line['images_per_s']:.1f}"}, refresh=False
        )
        self.bar.update()

    def ledger(self, step: int, samples: int, seconds: float, **cost: Any) -> None:
        """What the run has cost so far, over all its sessions."""
        known = {"steps": step, "samples": samples, "hours": seconds / 3600}
        write_json(self.run_dir / "ledger.json", known | cost)

    def close(self) -> None:
        """Flush and close whatever is open."""
        for close in reversed(self.closing):
            close()
        self.closing.clear()


def check_tracker(name: str) -> None:
    """Raise ValueError when what `trainer.tracker` asks for is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"trainer.tracker={name} is not installed: pip install {name}, or trainer.tracker=none"
        )


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written one, so that no step appears twice."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= step:
            kept.append(text + "\n")
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def environment() -> dict[str, Any]:
    """Where a run takes place: versions, machine and commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "commit": git_commit(),
        "command": sys.argv,
    }


def git_commit() -> str | None:
    """The commit of the source tree this runs from, None outside one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
