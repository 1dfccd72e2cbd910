"""LoRAs put on and taken off between network calls."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusionfm.lora import add_lora, check_base, check_lora
from diffusionfm.pipeline import DiffusionFMPipeline

Loras = tuple[tuple[str, float], ...]  # (name, scale)
MAX_SCALE = 4.0
MOST_PRIVATE = 16  # LoRAs added to a running engine


class Wardrobe:
    """The LoRAs that a pipeline was loaded with: `wear` puts some to work, at any scale, and lets the others rest.

    More may be added meanwhile: those are `private`, for whoever knows their names, NAME+SECRET, and are never listed.
    Raises ValueError for a DoRA that was loaded at scale 0: what it learned of magnitudes is lost by that.
    """

    def __init__(self, pipe: DiffusionFMPipeline):
        self.pipe = pipe
        self.known = dict(pipe.loras)
        self.private: list[str] = []  # the latest last
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

        Beyond MOST_PRIVATE the one unused for longest goes, unless it is in use. ValueError as `load_lora`."""
        if name in self.known:
            if name in self.private:
                self.private.append(self.private.pop(self.private.index(name)))
            return
        check_lora(source)
        check_base(source, self.pipe.model_name, self.pipe.base_hash)
        for old in [one for one in self.private if one not in in_use][: len(self.private) + 1 - MOST_PRIVATE]:
            self._remove(old)
        self._show()
        add_lora(self.pipe.networks, source, 1.0, set(self.known), name)
        self.known[name] = 1.0
        self.private.append(name)
        self._look()

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
        del self.known[name]
        self.private.remove(name)
        self._look()

    def check(self, loras: Loras) -> None:
        """ValueError unless all of these are here, each at a scale from -4 to 4."""
        for name, scale in loras:
            if name not in self.known:
                there = [one for one in self.known if one not in self.private]
                raise ValueError(f"no LoRA {name!r} here: {', '.join(there) or 'none is registered'}")
            if not abs(scale) <= MAX_SCALE:
                raise ValueError(f"a LoRA's scale must be from -4 to 4, got {scale}")

    def named(self, loras: Loras) -> dict[str, float]:
        """The scales by the names that pictures tell: of a private one what stands before its "+"."""
        return {name.partition("+")[0] if name in self.private else name: scale for name, scale in loras}

    def wear(self, loras: Loras) -> None:
        """Have these LoRAs, and no others, at work."""
        if loras == self._worn:
            return
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
