"""LoRAs put on and taken off between network calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusionfm.pipeline import DiffusionFMPipeline

Loras = tuple[tuple[str, float], ...]  # (name, scale)
MAX_SCALE = 4.0


class Wardrobe:
    """The LoRAs that a pipeline was loaded with: `wear` puts some to work, at any scale, and lets the others rest.

    Raises ValueError for a DoRA that was loaded at scale 0: what it learned of magnitudes is lost by that.
    """

    def __init__(self, pipe: DiffusionFMPipeline):
        self.known = dict(pipe.loras)
        self._worn: Loras | None = None
        networks = (pipe.transformer, pipe.text_encoder)
        self._layers = [
            layer for network in networks for layer in network.modules() if hasattr(layer, "set_scale")
        ]
        self._magnitudes = [self._magnitudes_of(layer) for layer in self._layers]

    def check(self, loras: Loras) -> None:
        """ValueError unless all of these are here, each at a scale from -4 to 4."""
        for name, scale in loras:
            if name not in self.known:
                raise ValueError(f"no LoRA {name!r} here: {', '.join(self.known) or 'none is registered'}")
            if not abs(scale) <= MAX_SCALE:
                raise ValueError(f"a LoRA's scale must be from -4 to 4, got {scale}")

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
