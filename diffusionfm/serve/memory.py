"""Memory of a server that runs for weeks: what requests leave behind is found and given back, at no cost that shows.

A job, its pictures and its future refer to each other, so that only the cycle collector frees them. It goes through
the hundreds of thousands of objects that imports made, and therefore seldom; and glibc's allocator keeps what is freed.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress

SECONDS = 5.0


def settle() -> None:
    """Call it when all is loaded, in a process that does nothing but serve: the collector looks at this no more."""
    gc.collect()
    gc.freeze()


class Tidy:
    """Call it as often as you like: every few seconds it collects cycles and gives freed memory back to the system."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self._last = seconds, time.monotonic()
        self._trim: Callable[[int], int] | None = None
        with suppress(OSError, AttributeError, TypeError):  # another C library, another system
            self._trim = ctypes.CDLL(None).malloc_trim

    def __call__(self) -> bool:
        """Whether it was time."""
        if time.monotonic() - self._last < self.seconds:
            return False
        gc.collect()
        if self._trim is not None:
            self._trim(0)
        self._last = time.monotonic()
        return True
