"""Few steps in place of many: a student adapter that makes each stride as the guided teacher makes several steps.

The teacher's way from noise to picture, guidance and all, is cut into as many strides as the student has steps. At
each cut the student learns the straight line to the next (piecewise distillation, as PeRFlow, arXiv:2405.07510, but on
the guided teacher's own paths from noise in place of noised data). One network call a step, and no guidance is left.

Axes: b batch, k cuts of a path (strides + 1), c channels, y x rows and columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from diffusionfm import flow, lora
from diffusionfm.checkpoint import write_json, write_weights
from diffusionfm.checks import told_checksum
from diffusionfm.drawing import plan_tasks
from diffusionfm.objectives import FlowMatching
from diffusionfm.pipeline import DiffusionFMPipeline

ADAPTER = "few_step"
TARGETS = ["attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "modulation", "patch_in", "patch_out"]


# ---- the teacher's paths ---------------------------------------------------------------------------------


@torch.inference_mode()
def teacher_path(
    pipe: DiffusionFMPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strides: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents (b, k, c, y, x) at the k = strides + 1 cuts of each prompt's guided path.

    ValueError when `steps` do not cut into equal strides."""
    if steps % strides:
        raise ValueError(f"{steps} steps of the teacher do not cut into {strides} equal strides")
    tasks = plan_tasks(list(prompts), None, list(seeds), 1)
    velocity = pipe.velocity(tasks, [float(guidance)] * len(tasks), {})
    x = pipe.noise(seeds, pipe.defaults["height"], pipe.defaults["width"]).to(pipe.device)
    cuts = [x]

    def keep(step: int, total: int, x: Tensor, v: Tensor) -> None:
        if step % (steps // strides) == 0:
            cuts.append(x)

    flow.euler(velocity, x, flow.grid(steps, pipe.defaults["shift"]), keep)
    return torch.stack(cuts, 1)


class Paths:
    """Strides stored by `train/paths.py`: item i is {"key", "from", "to", "stride", "caption"}, latents (c, y, x).

    strides: how many to a path, of the stored cuts' even share; None for all of them. held_out: the last so many
    paths are kept apart, in `unseen`. ValueError for the paths of another model, and where the numbers do not agree.
    """

    def __init__(
        self, folder: str | os.PathLike[str], made_by: str, strides: int | None = None, held_out: int = 0
    ):
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"no paths in {folder}: make them with train/paths.py")
        cuts: list[Tensor] = []
        captions: list[str] = []
        for file in files:
            with safe_open(file, "pt") as stored:
                told = stored.metadata() or {}
                if told.get("model") != made_by:
                    raise ValueError(
                        f"{file} holds the paths of another model: make them anew in another folder"
                    )
                cuts.append(stored.get_tensor("cuts"))
            captions += told["captions"].split("\n")
        whole = torch.cat(cuts)
        stored_strides = whole.shape[1] - 1
        self.strides = strides or stored_strides
        if stored_strides % self.strides:
            raise ValueError(
                f"the {stored_strides} strides of the paths in {folder} do not make {self.strides}: take a divisor"
            )
        count = len(whole) - held_out
        if count < 1:
            raise ValueError(
                f"{folder} holds {len(whole)} paths, of which {held_out} were to be held out: make more"
            )
        whole = whole[:, :: stored_strides // self.strides]
        self.paths, self.captions = whole[:count], captions[:count]
        self.unseen = whole[count:], captions[count:]
        self.fingerprint = f"{made_by} {len(self)} strides"

    def __len__(self) -> int:
        return len(self.paths) * self.strides

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, stride = divmod(i, self.strides)
        here, there = self.paths[path, stride : stride + 2]
        return {
            "key": f"{path}/{stride}",
            "from": here,
            "to": there,
            "stride": stride,
            "caption": self.captions[path],
        }


def collate_strides(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Strides -> key, from and to (b, c, y, x) float32, stride (b,), caption."""
    batch: dict[str, Any] = {name: [s[name] for s in samples] for name in ("key", "caption")}
    batch |= {name: torch.stack([s[name] for s in samples]).float() for name in ("from", "to")}
    return batch | {"stride": torch.tensor([s["stride"] for s in samples])}


# ---- the student -----------------------------------------------------------------------------------------


class Strides(FlowMatching):
    """Trains a LoRA on a frozen denoiser to make each stride in one step, without guidance.

    strides: the student's steps, along flow.grid(strides, shift). rank: of the LoRA.
    """

    def __init__(self, pipe: DiffusionFMPipeline, strides: int, rank: int, seed: int = 0):
        super().__init__(pipe.transformer.requires_grad_(False), pipe.text_encoder, pipe.tokenizer)
        self.cuts = flow.grid(strides, pipe.defaults["shift"])
        self.shift = pipe.defaults["shift"]
        home = pipe.config.get("_name_or_path")
        self.teacher = told_checksum(Path(home), "transformer") if home else ""
        self.config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, base_model_name_or_path=pipe.model_name
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.config, pipe.transformer, adapter_name=ADAPTER)
        weights = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
        self.lora = nn.ParameterDict({name.replace(".", "/"): p for name, p in weights.items()})

    def networks(self) -> dict[str, nn.Module]:
        """The adapter's matrices alone are trained, averaged and checkpointed."""
        return {"lora": self.lora}

    def compile_networks(self) -> None:
        """Compile the denoiser, adapter and all."""
        self.denoiser.compile()

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch as of `collate_strides`; the mean squared error of the velocity along the stride, also by stride."""
        here, there, stride = batch["from"], batch["to"], batch["stride"]
        times = self.cuts.to(here.device)
        t, until = times[stride], times[stride + 1]
        text, mask = self.read(batch["caption"])
        self.shapes = here.shape[1:], text.shape[1:]
        v = self.denoiser(here, t, text, mask).float()
        wanted = (there - here) / (until - t)[:, None, None, None]
        error = (v - wanted).square().mean(dim=(1, 2, 3))
        each = {f"loss_stride{k}": _mean_where(error.detach(), stride == k) for k in range(len(times) - 1)}
        return error.mean(), each

    @torch.inference_mode()
    def validation(self, cuts: Tensor, captions: list[str]) -> dict[str, float]:
        """How far the student is from the teacher on paths (b, k, c, y, x) that it did not learn.

        heldout_loss: as in training, over all strides. heldout_end: mean squared distance of the two ends, where the
        student has gone all its strides by itself, over the spread of the teacher's ends."""
        text, mask = self.read(captions)
        cuts, times = cuts.to(text.device).float(), self.cuts.to(text.device)
        own, losses = cuts[:, 0], []
        for k in range(len(times) - 1):
            t, span = times[k].expand(len(cuts)), times[k + 1] - times[k]
            v = self.denoiser(cuts[:, k], t, text, mask).float()
            losses.append((v - (cuts[:, k + 1] - cuts[:, k]) / span).square().mean())
            own = own + span * (v if k == 0 else self.denoiser(own, t, text, mask).float())
        end = (own - cuts[:, -1]).square().mean() / cuts[:, -1].var()
        return {"heldout_loss": float(torch.stack(losses).mean()), "heldout_end": float(end)}

    def export(self, folder: Path) -> None:
        """PEFT's two files, in half precision, and generation.json, in FOLDER/few_step.

        The latter tells how to draw, and the SHA-256 of the teacher's weights: the adapter is for no other."""
        place = folder / lora.FEW_STEP
        place.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER, save_embedding_layers=False)
        write_weights(
            place / lora.WEIGHTS, {f"{lora.PEFT}{key}": value.half() for key, value in weights.items()}
        )
        settings = {**self.config.to_dict(), "inference_mode": True}
        write_json(
            place / lora.CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        )
        drawn_at = {"steps": len(self.cuts) - 1, "guidance": 1.0, "shift": self.shift}
        write_json(place / "generation.json", {**drawn_at, "teacher": self.teacher})


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
