"""What fine-tuning trains: a LoRA or DoRA on frozen networks, or all their weights; and the best step, kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffusionfm import flow, lora
from diffusionfm.checkpoint import replace_folder, write_json, write_weights
from diffusionfm.finetune.settings import FinetuneConfig
from diffusionfm.objectives import FlowMatching
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.text import encode_prompts

ADAPTER = "default"
Weights = dict[str, nn.Parameter]


class Best(nn.Module):
    """The trained weights at the validation with the lowest loss: buffers, so that every checkpoint carries them."""

    step: Tensor
    loss: Tensor

    def __init__(self, weights: Weights):
        super().__init__()
        self.names = {name: name.replace(".", "/") for name in weights}
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("loss", torch.full((), float("inf")))
        for name, weight in weights.items():
            self.register_buffer(self.names[name], weight.detach().clone())

    @torch.no_grad()
    def offer(self, step: int, loss: float, weights: Weights) -> bool:
        """Keep these weights if their loss is the lowest yet; whether it is."""
        if not loss < float(self.loss):
            return False
        self.step.fill_(step)
        self.loss.fill_(loss)
        for name, weight in weights.items():
            self.get_buffer(self.names[name]).copy_(weight)
        return True

    @contextmanager
    def in_place(self, weights: Weights) -> Iterator[None]:
        """These weights take the best values inside the `with` block; nothing happens before the first offer."""
        kept = {name: self.get_buffer(self.names[name]) for name in weights} if int(self.step) else {}
        with swapped(weights, kept):
            yield


@contextmanager
def swapped(weights: Weights, values: dict[str, Tensor]) -> Iterator[None]:
    """The weights named in `values` have those values inside the `with` block."""
    before = {name: weights[name].data for name in values}
    for name, value in values.items():
        weights[name].data = value.to(before[name].device)
    try:
        yield
    finally:
        for name, value in before.items():
            weights[name].data = value


class Adapting(FlowMatching):
    """FlowMatching on a loaded pipeline's denoiser, and where asked for its text encoder.

    A subclass says which weights are trained, what the base model is, and what a run leaves.
    """

    def __init__(self, pipe: DiffusionFMPipeline, cfg: FinetuneConfig):
        super().__init__(
            pipe.transformer.requires_grad_(False), pipe.text_encoder, pipe.tokenizer, **cfg.objective
        )
        self.pipe, self.reads = pipe, cfg.text_encoder
        self.targets: dict[str, Any] = {"transformer": pipe.transformer}
        if cfg.text_encoder:
            self.targets["text_encoder"] = pipe.text_encoder

    def keep_best(self, weights: Weights) -> None:
        """Make a place for the best weights; the ranks of a shared run need not send them round."""
        self.weights, self.best = weights, Best(weights)
        self._ddp_params_and_buffers_to_ignore = [f"best.{name}" for name, _ in self.best.named_buffers()]

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text features (b, l, d) and mask (b, l), with gradients where the text encoder is trained."""
        if not self.reads:
            return super().read(captions)
        text, mask, _ = encode_prompts(
            self.tokenizer, self.text_encoder, captions, multiple=self.text_multiple
        )
        return text, mask

    def ends(
        self, batch: dict, x0: Tensor, noise: Tensor, t: Tensor, text: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The model's own pictures train towards what the base model says of them, not towards the pictures.

        That is what the base model knows, less the noise of single samples (learning without forgetting,
        arXiv:1606.09282). A text encoder that is trained makes the base model's answer another; then they stay."""
        own = batch["own"].nonzero().flatten()
        if self.reads or not len(own):
            return x0, noise
        x, at = flow.interpolate(x0[own], noise[own], t[own]), t[own]
        with torch.no_grad(), self.base():
            v = self.denoiser(x, at, text[own], mask[own]).float()
        ends = (x0, flow.denoised(x, at, v)), (noise, flow.implied_noise(x, at, v))
        x0, noise = (given.index_copy(0, own, told) for given, told in ends)
        return x0, noise

    def compile_networks(self) -> None:
        """Compile the denoiser, adapter and all."""
        self.denoiser.compile()

    def export(self, folder: Path) -> None:
        """Write what a run leaves, with the best weights once there are such."""
        with self.best.in_place(self.weights):
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write what a run leaves, with the weights as they are."""
        raise NotImplementedError

    def base(self) -> Any:
        """A context in which the networks are as they were."""
        raise NotImplementedError


class AdapterFlowMatching(Adapting):
    """Trains a LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353); all else is frozen."""

    def unweighted(self) -> nn.Module:
        """The frozen denoiser, whose weights take no gradients, and the adapter."""
        network = super().unweighted().requires_grad_(False)
        inject_adapter_in_model(self.configs["transformer"], network, adapter_name=ADAPTER)
        return network

    def __init__(self, pipe: DiffusionFMPipeline, cfg: FinetuneConfig):
        super().__init__(pipe, cfg)
        self.configs = {}
        base: dict[str, Any] = {lora.BASE_NAME: pipe.model_name, lora.BASE_HASH: pipe.base_hash or None}
        weights: Weights = {}
        for name, network in self.targets.items():
            self.configs[name] = LoraConfig(
                r=cfg.rank,
                lora_alpha=cfg.alpha or cfg.rank,
                target_modules=target_layers(network, cfg.targets),
                use_dora=cfg.method == "dora",
                **base,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.trainer.seed)
                inject_adapter_in_model(self.configs[name], network, adapter_name=ADAPTER)
            nn.Module.to(network, pipe.device)
            prefix = "" if name == "transformer" else f"{name}."
            weights |= {f"{prefix}{k}": p for k, p in network.named_parameters() if p.requires_grad}
        self.lora = nn.ParameterDict({key.replace(".", "/"): p for key, p in weights.items()})
        self.keep_best(weights)

    def networks(self) -> dict[str, nn.Module]:
        """The adapter's matrices alone are trained, averaged and checkpointed, beside their best values."""
        return {"lora": self.lora, "best": self.best}

    def write(self, folder: Path) -> None:
        """PEFT's adapter_config.json and adapter_model.safetensors, the text encoder's in a folder of its own."""
        for name, network in self.targets.items():
            place = folder if name == "transformer" else folder / name
            place.mkdir(parents=True, exist_ok=True)
            weights = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
            full = {f"base_model.model.{key}": value for key, value in weights.items()}
            write_weights(place / lora.WEIGHTS, full)
            settings = {**self.configs[name].to_dict(), "inference_mode": True}
            plain = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
            write_json(place / lora.CONFIG, plain)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The networks as they were, the adapter switched off, inside the `with` block."""
        layers = [m for n in self.targets.values() for m in n.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


class FullFlowMatching(Adapting):
    """Trains every weight of the denoiser; a run leaves a whole pipeline folder."""

    def __init__(self, pipe: DiffusionFMPipeline, cfg: FinetuneConfig):
        super().__init__(pipe, cfg)
        for network in self.targets.values():
            network.requires_grad_(True)
        weights = {f"{n}.{key}": p for n, net in self.targets.items() for key, p in net.named_parameters()}
        self.original = {name: p.detach().cpu().clone() for name, p in weights.items()}
        self.keep_best(weights)

    def networks(self) -> dict[str, nn.Module]:
        """The networks trained, beside the best values of their weights."""
        return {**self.targets, "best": self.best}

    def write(self, folder: Path) -> None:
        """The pipeline folder: `--model FOLDER` uses it."""
        aside = folder / ".pipeline.partial"
        shutil.rmtree(aside, ignore_errors=True)
        self.pipe.save_pretrained(aside)
        for part in sorted(aside.iterdir()):
            if part.is_dir():
                replace_folder(part, folder / part.name)
            else:
                os.replace(part, folder / part.name)
        aside.rmdir()

    @contextmanager
    def base(self) -> Iterator[None]:
        """The networks as they were, inside the `with` block."""
        with swapped(self.weights, self.original):
            yield


def build(pipe: DiffusionFMPipeline, cfg: FinetuneConfig) -> Adapting:
    """The objective of a config's method. ValueError for a rank above the narrowest layer it adapts."""
    if cfg.method == "full":
        return FullFlowMatching(pipe, cfg)
    names = ["transformer", "text_encoder"] if cfg.text_encoder else ["transformer"]
    for network in (getattr(pipe, name) for name in names):
        chosen = tuple(target_layers(network, cfg.targets))
        widths = [min(m.weight.shape) for key, m in network.named_modules() if key.endswith(chosen)]
        if cfg.rank > min(widths):
            raise ValueError(
                f"rank is {cfg.rank}, but the narrowest layer it adapts is {min(widths)} wide: take less"
            )
    return AdapterFlowMatching(pipe, cfg)


def target_layers(network: nn.Module, targets: str) -> list[str]:
    """The ends of the names of the layers to adapt: those a denoiser names, or a text encoder's linear ones."""
    known = getattr(network, "lora_targets", None)
    if known is None:  # the layers inside the encoder's blocks, by the last two parts of their names
        inside = (name.split(".") for name, m in network.named_modules() if isinstance(m, nn.Linear))
        known = sorted({".".join(parts[-2:]) for parts in inside if any(part.isdigit() for part in parts)})
    is_attention: Callable[[str], bool] = lambda name: "attention" in name or "self." in name  # noqa: E731
    return [name for name in known if targets == "all" or is_attention(name)]
