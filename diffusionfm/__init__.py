"""DiffusionFM: a text-to-image latent diffusion foundation model. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionfm.pipeline import Cancelled as Cancelled
    from diffusionfm.pipeline import DiffusionFMPipeline as DiffusionFMPipeline

__version__ = "0.1.0"
__all__ = ["Cancelled", "DiffusionFMPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("DiffusionFMPipeline", "Cancelled"):
        from diffusionfm import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'diffusionfm' has no attribute {name!r}")
