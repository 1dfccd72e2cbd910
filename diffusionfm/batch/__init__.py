"""Scripted generation: rows in, pictures and a manifest out, each picture exactly once. Names load on first use.

A picture is written to a temporary file, synced and renamed, or appended to a shard and synced; then its line is added
to DIR/manifest.jsonl. Running the same command again goes on where the last run was stopped, however it was stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionfm.batch.report import Summary as Summary
    from diffusionfm.batch.run import generate_batch as generate_batch
    from diffusionfm.batch.run import plan_batch as plan_batch

__all__ = ["Summary", "generate_batch", "plan_batch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffusionfm.batch import run

        return getattr(run, name)
    raise AttributeError(f"module 'diffusionfm.batch' has no attribute {name!r}")
