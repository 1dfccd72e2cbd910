"""LoRAs put on and taken off between network calls."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusionfm.lora import add_lora, check_base, check_lora
from diffusionfm.pipeline import DiffusionFMPipeline

Loras = tuple[tuple[str, float], ...]  # (name, scale)
MAX_SCALE = 4.0
MOST_PRIVATE = 16  # LoRAs added to a running engine
GRACE = 60.0
"""Seconds that one of those stays at least after it was asked for, so that what asked can draw with it."""


class Wardrobe:
    """The LoRAs that a pipeline was loaded with: `wear` puts some to work, at any scale, and lets the others rest.

    More may be added meanwhile: those are `private`, for whoever knows their names, NAME+SECRET, and are never listed.
    Raises ValueError for a DoRA that was loaded at scale 0: what it learned of magnitudes is lost by that.
    """

    def __init__(self, pipe: DiffusionFMPipeline):
        self.pipe = pipe
        self.known = dict(pipe.loras)
        self.public = tuple(self.known)  # listed to all
        self.private: dict[str, float] = {}  # and when each was asked for
        self._look()

    def _look(self) -> None:
        """Find the adapted layers; nothing is worn for certain."""
        self._worn: Loras | None = None
        self._layers = [
            layer
            for network in self.pipe.networks.values()
            for layer in network.modules()
            if hasattr(layer, "set_scale")
        ]
        self._magnitudes = [self._magnitudes_of(layer) for layer in self._layers]

    def add(self, source: Path, name: str, in_use: Collection[str] = ()) -> None:
        """Add a private LoRA under `name`, which has no dot; one that is there already is left as it is.

        Beyond MOST_PRIVATE the one unused for longest goes, unless it is in use or was asked for within GRACE seconds.
        ValueError as `load_lora`."""
        if name in self.public:
            return
        if name not in self.known:
            self._put_in(source, name, in_use)
        self.private[name] = time.monotonic()

    def _put_in(self, source: Path, name: str, in_use: Collection[str]) -> None:
        check_lora(source)
        check_base(source, self.pipe.model_name, self.pipe.base_hash)
        too_many = max(0, len(self.private) + 1 - MOST_PRIVATE)
        for old in self._unused(in_use)[:too_many]:
            self._remove(old)
        self._show()
        add_lora(self.pipe.networks, source, 1.0, set(self.known), name)
        self.known[name] = 1.0
        self._look()

    def _unused(self, in_use: Collection[str]) -> list[str]:
        """The private ones that may go, the one unused for longest first."""
        before = time.monotonic() - GRACE
        old = [name for name, asked in self.private.items() if asked < before and name not in in_use]
        return sorted(old, key=self.private.__getitem__)

    def _show(self) -> None:
        """Have all at their own scales on the layers, at rest: from there `_look` tells a DoRA's magnitudes."""
        self.wear(tuple(self.known.items()))
        self._worn = None
        for layer in self._layers:
            layer.set_adapter([], inference_mode=True)

    def _remove(self, name: str) -> None:
        self._show()
        for layer in self._layers:
            if name in layer.scaling:
                layer.delete_adapter(name)
        for network in self.pipe.networks.values():
            getattr(network, "peft_config", {}).pop(name, None)
        del self.known[name], self.private[name]
        self._look()

    def check(self, loras: Loras) -> None:
        """ValueError unless all of these are here, each at a scale from -4 to 4."""
        for name, scale in loras:
            if name not in self.known:
                there = ", ".join(self.public) or "none is registered"
                raise ValueError(f"no LoRA {self._told(name)!r} here: {there}")
            if not abs(scale) <= MAX_SCALE:
                raise ValueError(f"a LoRA's scale must be from -4 to 4, got {scale}")

    def named(self, loras: Loras) -> dict[str, float]:
        """The scales by the names that pictures tell."""
        return {self._told(name): scale for name, scale in loras}

    def _told(self, name: str) -> str:
        """The name to tell: of all but public ones what stands before the "+", for the rest is secret."""
        return name if name in self.public else name.partition("+")[0]

    def wear(self, loras: Loras) -> None:
        """Have these LoRAs, and no others, at work. ValueError where one has gone since it was asked for."""
        if loras == self._worn:
            return
        for name, _ in loras:
            if name not in self.known:
                raise ValueError(f"the LoRA {self._told(name)!r} is no longer here: ask again")
        self._worn = None  # until every layer wears them
        for layer, magnitudes in zip(self._layers, self._magnitudes, strict=True):
            here = [name for name, _ in loras if name in layer.scaling]
            for name, scale in loras:
                if name in here:
                    layer.set_scale(name, scale)
                if name in magnitudes:
                    own, learned = magnitudes[name]
                    layer.lora_magnitude_vector[name].weight.data = own + scale / self.known[name] * learned
            layer.set_adapter(here, inference_mode=True)
        self._worn = loras

    def _magnitudes_of(self, layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every DoRA on a layer: the magnitudes of the layer itself, and how far the DoRA, as loaded, moves them."""
        found = {}
        for name, vector in getattr(layer, "lora_magnitude_vector", {}).items():
            if not self.known.get(name):
                raise ValueError(f"the DoRA {name!r} was loaded at scale 0: load it at another")
            now = vector.weight.detach()
            own = layer.get_base_layer().weight.detach().norm(dim=1).to(now.dtype)
            found[name] = own, now - own
        return found
