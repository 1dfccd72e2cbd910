"""One process at a time in a folder that a run writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusionfm.images import sync_folder

LOCK = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock file; a second process gets ValueError. A killed process frees it."""
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing to {out}: wait for it, or use another --out"
            ) from error
        yield
        sync_folder(out)
    finally:
        os.close(handle)
