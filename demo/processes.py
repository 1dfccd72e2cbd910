"""The library's commands as processes of their own, in a session of their own, behind whoever draws in the studio."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import diffusionfm
from diffusionfm.images import write_atomic

PATIENCE = 30.0  # seconds that a process is given to stop by itself
NICE = 10  # so that drawing in the studio goes first
PID = "pid"
Command = list[str]
"""Arguments of `diffusionfm`."""


def begun(folder: Path, command: Command) -> subprocess.Popen:
    """`diffusionfm COMMAND` as a process of its own, inside the folder, whose lock it holds while it lives."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(folder / "lock", "w"))
        log, errors = (stack.enter_context(open(folder / name, "ab")) for name in ("log.txt", "errors.txt"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process = subprocess.Popen(
            _line(command), stdin=subprocess.DEVNULL, stdout=log, stderr=errors, pass_fds=[lock.fileno()],
            start_new_session=True, env=_environment(), cwd=folder,
        )  # fmt: skip
    try:
        write_atomic(folder / PID, str(process.pid).encode())
    except OSError:  # nobody could stop it
        process.kill()
        process.wait()
        raise
    return process


def ask(folder: Path, command: Command) -> tuple[int, str, str]:
    """Run a short command inside a folder to its end: its exit code, what it said, and why it failed."""
    process = subprocess.Popen(
        _line(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=_environment(), cwd=folder,
    )  # fmt: skip
    said, errors = process.communicate()
    lines = errors.strip().splitlines() or [""]
    return process.returncode, said, lines[-1].removeprefix("error: ")


def _line(command: Command) -> list[str]:
    first = ["nice", "-n", str(NICE)] if shutil.which("nice") else []
    return [*first, sys.executable, "-m", "diffusionfm.cli", *command]


def _environment() -> dict[str, str]:
    package = str(Path(diffusionfm.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    # PYTHONSAFEPATH: nothing in the folder that it runs in is taken for a module
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def end(folder: Path) -> None:
    """Ask the process that holds a folder's lock to stop, and see to it that it does."""
    if not is_locked(folder):
        return
    process = (folder / PID).read_text()
    _signal(process, signal.SIGTERM)
    timer = threading.Timer(PATIENCE, _insist, [folder, process])
    timer.daemon = True
    timer.start()


def _insist(folder: Path, process: str) -> None:
    """Kill the process, if it is still the one that holds the folder's lock: its successor was not meant."""
    if is_locked(folder) and (folder / PID).read_text() == process:
        _signal(process, signal.SIGKILL)


def _signal(process: str, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(process), number)  # it leads a session of its own


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder's lock; one that is not there, nobody does."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(folder / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
