"""Few steps in place of many: a student adapter that makes each stride as the guided teacher makes several steps.

The teacher's way from noise to picture, guidance and all, is cut into as many strides as the student has steps. At
each cut the student learns the straight line to the next (piecewise distillation, as PeRFlow, arXiv:2405.07510, but on
the guided teacher's own paths from noise in place of noised data). One network call a step, and no guidance is left.
Where the student's own way has led it, the teacher tells how to go on, and it learns that too (DAgger,
arXiv:1011.0686).

Axes: b batch, k strides, c channels, y x rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusionfm import flow, lora
from diffusionfm.checkpoint import write_json, write_weights
from diffusionfm.checks import told_checksum
from diffusionfm.drawing import Painter, plan_tasks
from diffusionfm.objectives import FlowMatching
from diffusionfm.pipeline import DiffusionFMPipeline

ADAPTER = "few_step"
TARGETS = ["attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "modulation", "patch_in", "patch_out"]


# ---- the teacher's paths ---------------------------------------------------------------------------------


@torch.inference_mode()
def teacher_strides(
    pipe: Painter,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strides: int,
    steps: int,
    guidance: float,
    student: Painter | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the strides of each prompt's guided path begin and where they end, latents (b, k, c, y, x) each.

    A stride begins where the one before it ends; with a student, where that has come by itself, without guidance.
    ValueError when `steps` do not cut into equal strides."""
    if steps % strides:
        raise ValueError(f"{steps} steps of the teacher do not cut into {strides} equal strides")
    tasks = plan_tasks(list(prompts), None, list(seeds), 1)
    velocity = pipe.velocity(tasks, [float(guidance)] * len(tasks), {})
    own = None if student is None else student.velocity(tasks, [1.0] * len(tasks), {})
    times, each = flow.grid(steps, pipe.defaults["shift"]), steps // strides
    x = pipe.noise(seeds, pipe.defaults["height"], pipe.defaults["width"]).to(pipe.device)
    begins, ends = [], []
    for k in range(strides):
        span = times[k * each : (k + 1) * each + 1]
        begins.append(x)
        ends.append(flow.euler(velocity, x, span))
        x = ends[-1] if own is None else flow.euler(own, x, span[[0, -1]])
    return torch.stack(begins, 1), torch.stack(ends, 1)


class Paths:
    """Strides stored by `train/paths.py`: item i is {"key", "from", "to", "stride", "caption"}, latents (c, y, x).

    folders: the first holds the teacher's own ways; its last `held_out` paths are kept apart, as begins, ends and
    captions, in `unseen`. ValueError for files that are no such paths, for those of another model or another shift than
    the pipeline's, and for folders that do not go together.
    """

    def __init__(
        self, folders: Sequence[str | os.PathLike[str]], pipe: DiffusionFMPipeline, held_out: int = 0
    ):
        if not folders:
            raise ValueError("paths is empty: name a folder that train/paths.py made")
        kept, drawn, digest, teacher = [], [], hashlib.sha256(), pipe.fingerprint()
        for folder in folders:
            files = sorted(Path(folder).glob("*.safetensors"))
            if not files:
                raise ValueError(f"no paths in {folder}: make them with train/paths.py")
            parts = [read_paths(file) for file in files]
            told = [meta for _, _, meta in parts]
            if any(meta["model"] != teacher for meta in told):
                raise ValueError(
                    f"{folder} holds the paths of another model: make them anew in another folder"
                )
            digest.update(json.dumps(told, sort_keys=True).encode())
            drawn.append(json.loads(told[0]["drawn"]) | {"strides": parts[0][0].shape[1]})
            captions = [text for meta in told for text in json.loads(meta["captions"])]
            kept.append((torch.cat([x for x, _, _ in parts]), torch.cat([x for _, x, _ in parts]), captions))
        _check_alike([str(folder) for folder in folders], drawn, pipe.defaults["shift"])
        begins, ends, captions = kept[0]
        count = len(begins) - held_out
        if count < 1:
            raise ValueError(
                f"{folders[0]} holds {len(begins)} paths, of which {held_out} were to be held out: make more"
            )
        self.unseen = begins[count:], ends[count:], captions[count:]
        kept[0] = begins[:count], ends[:count], captions[:count]
        self.strides = begins.shape[1]
        self.begins, self.ends = torch.cat([x for x, _, _ in kept]), torch.cat([x for _, x, _ in kept])
        self.captions = [text for _, _, texts in kept for text in texts]
        self.fingerprint = f"{digest.hexdigest()[:12]} {len(self)} strides"

    def __len__(self) -> int:
        return len(self.begins) * self.strides

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, stride = divmod(i, self.strides)
        return {
            "key": f"{path}/{stride}",
            "from": self.begins[path, stride],
            "to": self.ends[path, stride],
            "stride": stride,
            "caption": self.captions[path],
        }


def read_paths(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Where the strides of a file begin and end, and what it tells of them; ValueError for any other file."""
    try:
        with safe_open(file, "pt") as stored:
            told = stored.metadata() or {}
            if {"model", "drawn", "captions"} <= set(told):
                return stored.get_tensor("from"), stored.get_tensor("to"), told
    except SafetensorError:
        pass
    raise ValueError(
        f"{file} is damaged, or no file of train/paths.py as it is now: remove it, and draw it anew"
    )


def _check_alike(folders: list[str], drawn: list[dict[str, Any]], shift: float) -> None:
    """ValueError where folders of paths, drawn with these settings, cannot be learned from together."""
    if "student" in drawn[0]:
        raise ValueError(f"{folders[0]} holds a student's ways: name a folder of the teacher's own first")
    if drawn[0]["shift"] != shift:
        raise ValueError(
            f"{folders[0]} was drawn with shift {drawn[0]['shift']:g}, the model now has {shift:g}: draw the paths anew"
        )
    for folder, told in zip(folders[1:], drawn[1:], strict=True):
        for name in ("strides", "steps", "guidance", "shift"):
            if told[name] != drawn[0][name]:
                raise ValueError(
                    f"{name} of {folder} is {told[name]:g}, of {folders[0]} {drawn[0][name]:g}: make them alike"
                )
    seeds = [told["seed"] for told in drawn]
    for k, seed in enumerate(seeds):
        if seed in seeds[:k]:
            raise ValueError(
                f"{folders[k]} and {folders[seeds.index(seed)]} have one seed, so the same captions and noise: "
                "draw one of them with another"
            )


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

    def set_out_from(self, folder: Path) -> None:
        """Take over the weights of FOLDER/few_step, as `export` writes them; ValueError where they do not fit."""
        source = folder / lora.FEW_STEP
        lora.check_lora(source)
        _, found = lora.read_folder(source)["transformer"]
        parts = (key.removeprefix(lora.PEFT).rpartition(".") for key in found)
        names = [f"{layer}.{ADAPTER}.{end}".replace(".", "/") for layer, _, end in parts]
        weights = dict(zip(names, found.values(), strict=True))
        try:
            self.lora.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{source} is no adapter of rank {self.config.r} for this model: set rank to its own"
            ) from error

    def networks(self) -> dict[str, nn.Module]:
        """The adapter's matrices alone are trained, averaged and checkpointed."""
        return {"lora": self.lora}

    def unweighted(self) -> nn.Module:
        """The frozen denoiser, whose weights take no gradients, and the adapter."""
        network = super().unweighted().requires_grad_(False)
        inject_adapter_in_model(self.config, network, adapter_name=ADAPTER)
        return network

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
    def validation(self, begins: Tensor, ends: Tensor, captions: list[str]) -> dict[str, float]:
        """How far the student is from the teacher on paths (b, k, c, y, x) that it did not learn.

        heldout_loss: as in training, over all strides. heldout_end: mean squared distance of the two ends, where the
        student has gone all its strides by itself, over the spread of the teacher's ends."""
        text, mask = self.read(captions)
        begins, ends = (part.to(text.device).float() for part in (begins, ends))
        times = self.cuts.to(text.device)
        own, losses = begins[:, 0], []
        for k in range(len(times) - 1):
            t, span = times[k].expand(len(begins)), times[k + 1] - times[k]
            v = self.denoiser(begins[:, k], t, text, mask).float()
            losses.append((v - (ends[:, k] - begins[:, k]) / span).square().mean())
            own = own + span * (v if k == 0 else self.denoiser(own, t, text, mask).float())
        end = (own - ends[:, -1]).square().mean() / ends[:, -1].var()
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
    """NaN where the mask is nowhere True."""
    return (values * mask).sum() / mask.sum()
