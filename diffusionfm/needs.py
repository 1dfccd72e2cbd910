"""What a recipe needs before it starts: make the missing paths, or say which one is missing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from diffusionfm.checks import read_json


def make_missing(needs: Mapping[str, str]) -> None:
    """Run, in order, the command of every path that is not there: arguments to this Python, no shell.

    needs: path -> command, as {"runs/x/shards": "-m diffusionfm.data.shapes --out runs/x/shards"}.
    A network of a run that was stopped is missing, too, and its run goes on, unless what needs it is there already.
    ValueError when a command fails, when its path is still missing afterwards, and for the ranks of a launch, which
    would all make it at once.
    """
    for k, (path, command) in enumerate(needs.items()):
        used = any(Path(later).exists() for later in list(needs)[k + 1 :])
        if Path(path).exists() and (used or not unfinished(Path(path))):
            continue
        what = f"{path} is unfinished" if Path(path).exists() else f"{path} is missing"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{what}: make it first, by one process: python {command}")
        print(f"{what}: python {command}", flush=True)
        code = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
        if code:
            raise ValueError(
                f"`python {command}`, which makes {path}, failed with exit code {code}: see above"
            )
        if not Path(path).exists():
            raise ValueError(f"`python {command}` did not make {path}: put the command right under `needs`")


def unfinished(network: Path) -> bool:
    """Whether a network is of a run that has steps to go: runs write theirs at every checkpoint."""
    ledger, config = network.parent / "ledger.json", network.parent / "config.yaml"
    if not (ledger.is_file() and config.is_file()):
        return False
    wanted = yaml.safe_load(config.read_text(encoding="utf-8")).get("trainer", {}).get("steps", 0)
    return bool(read_json(ledger).get("steps", wanted) < wanted)


def require(**paths: str) -> None:
    """ValueError, naming the key, for the first path that is not a folder."""
    for key, path in paths.items():
        if not Path(path).is_dir():
            raise ValueError(f"{key}={path}: no such folder; make it with its own recipe, or name another")
