"""The pictures to learn from, as latents with captions; and those that the base model draws of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusionfm.checkpoint import write_json, write_weights, writing
from diffusionfm.data.captions import TRIGGER
from diffusionfm.data.folder import SUFFIXES, PictureDataset, hidden, scan, scan_shards, square
from diffusionfm.data.order import Order
from diffusionfm.data.preflight import Preflight, Usable, preflight_sheet, printable
from diffusionfm.data.training import choose_caption, pixels
from diffusionfm.finetune.settings import CLASS_SHARE, PREFLIGHT, SHEET, FinetuneConfig
from diffusionfm.images import save_png
from diffusionfm.objectives import as_float
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.text import truncated_words

Say = Callable[[str], object]
Sample = dict[str, Any]  # "key", "latent" (c, y, x), "captions", "heldout"; "own" if the base model drew it

MAX_HELD_OUT = 64
SHEET_PROMPTS = 4
OWN = "own.safetensors"
PRIOR_SEED = 1_000_000  # forgetting is measured on seeds from 0, prior pictures are drawn from here on


# ---- what is there -------------------------------------------------------------------------------------------


def is_shards(folder: Path) -> bool:
    """Whether pictures come as shards: a .tar, or a folder with one. ValueError where pictures lie beside it."""
    if folder.suffix.lower() == ".tar":
        return True
    inside = [path for path in sorted(folder.rglob("*")) if not hidden(path.relative_to(folder))]
    tar = next((path for path in inside if path.suffix == ".tar" and path.parent == folder), None)
    picture = next((path for path in inside if path.suffix.lower() in SUFFIXES), None)
    if tar and picture:
        raise ValueError(
            f"{folder} holds pictures ({printable(picture.name)}) and a shard ({printable(tar.name)}): "
            "move away what is not to be learned"
        )
    return tar is not None


def look_through(
    folder: Path, size: int, captions: str, shown_as: str, say: Say
) -> tuple[Preflight, list[Usable]]:
    """The report on a folder of pictures, or on the shards in it, said, and what can be decoded; nothing is refused."""
    report, found = (scan_shards if is_shards(folder) else scan)(folder, size, captions)
    report.folder = shown_as
    say(str(report))
    return report, found


def write_preflight(out: Path, report: Preflight, shown: Sequence[Sample]) -> None:
    """preflight.json, and preflight.png where there is a picture to show."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PREFLIGHT, report.as_dict())
        if shown:
            save_png(preflight_sheet(shown), out / SHEET)


def with_trigger(caption: str, trigger: str) -> str:
    """A caption that says the trigger: in the place of [trigger], where it is said, or else before all."""
    if not trigger:
        return caption
    if TRIGGER in caption:
        return caption.replace(TRIGGER, trigger)
    said = re.search(_as_word(trigger), caption, re.IGNORECASE)
    return caption if said else f"{trigger}, {caption}"


def _as_word(trigger: str) -> str:
    """A pattern for the trigger as a word of its own, whatever marks are around it."""
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"


# ---- as latents ----------------------------------------------------------------------------------------------


def encode(
    pipe: DiffusionFMPipeline,
    dataset: PictureDataset,
    trigger: str = "",
    say: Say = print,
    batch_size: int = 16,
) -> tuple[list[Sample], str]:
    """Every picture as a latent on the CPU, and 12 hex digits of the SHA-256 over all pictures and captions."""
    samples: list[Sample] = []
    waiting: list[Tensor] = []
    digest, put_before = hashlib.sha256(), 0
    for source in dataset:
        meta, said = source["meta"], source["meta"]["captions"]
        texts = [with_trigger(text, trigger) for text in said]
        if any(TRIGGER in text for text in texts):
            raise ValueError(f"captions hold {TRIGGER}: give the word that it stands for, as --trigger zkw")
        put_before += bool(trigger) and texts[0] == f"{trigger}, {said[0]}"
        waiting.append(_pixels(source["picture"], pipe.defaults["height"]))
        digest.update(waiting[-1].numpy().tobytes() + "\0".join(["", *texts, ""]).encode())
        samples.append({"key": meta["name"], "captions": texts, "heldout": meta["split"] == "heldout"})
        if len(waiting) == batch_size:
            _flush(pipe, samples, waiting)
    _flush(pipe, samples, waiting)
    if put_before:
        say(f"the trigger {trigger!r} was put before {put_before} captions that did not say it")
    for sample in samples:
        lost = truncated_words(pipe.tokenizer, sample["captions"][0])
        if lost:
            say(f"caption too long: {sample['key']}: the model does not read {lost[:80]!r}")
    return samples, digest.hexdigest()[:12]


def _pixels(picture: Image.Image, size: int) -> Tensor:
    return pixels({"picture": picture if picture.size == (size, size) else square(picture, size)})


def _flush(pipe: DiffusionFMPipeline, samples: list[Sample], waiting: list[Tensor]) -> None:
    """Encode the pictures that wait, which are those of the last samples."""
    if waiting:
        for sample, latent in zip(samples[-len(waiting) :], to_latents(pipe, waiting), strict=True):
            sample["latent"] = latent
        waiting.clear()


@torch.no_grad()
def to_latents(pipe: DiffusionFMPipeline, pictures: Sequence[Tensor]) -> Tensor:
    """Latents (b, c, y, x), float32 on the CPU, of straight RGBA pictures, uint8 (4, y, x) each."""
    return pipe.vae.encode(as_float(torch.stack(list(pictures))).to(pipe.device)).float().cpu()


def hold_out(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(to train on, held out): the first 64 that the data hold out, else 10 % of 10 or more pictures, 64 at most."""
    chosen = [i for i, sample in enumerate(samples) if sample["heldout"]]
    if not chosen or len(chosen) == len(samples):
        chosen = Order(len(samples), seed).epoch(0)[: min(len(samples) // 10, MAX_HELD_OUT)].tolist()
    kept = sorted(set(range(len(samples))) - set(chosen))
    return [samples[i] for i in kept], [samples[i] for i in sorted(chosen)[:MAX_HELD_OUT]]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> {"key": [...], "latent" (b, c, y, x), "caption": [...], "own" (b,)}, one caption chosen for each."""
    return {
        "key": [s["key"] for s in samples],
        "latent": torch.stack([s["latent"] for s in samples]),
        "caption": [choose_caption(s["captions"], s.get("draw", 0)) for s in samples],
        "own": torch.tensor([s.get("own", False) for s in samples]),
    }


def sheet_prompts(samples: list[Sample]) -> list[str]:
    """The first captions of the set, each once: what the sample sheets draw when nothing else is asked for."""
    return list(dict.fromkeys(sample["captions"][0] for sample in samples))[:SHEET_PROMPTS]


# ---- what the base model draws ---------------------------------------------------------------------------------


def class_prompts(samples: list[Sample], trigger: str) -> list[str]:
    """The captions without the trigger, or without "of" it, each once: what they say of the subject's class."""
    word = re.compile(rf"(\bof )?{_as_word(trigger)}\W*", re.IGNORECASE)
    said = [word.sub("", caption).strip() for sample in samples for caption in sample["captions"]]
    return list(dict.fromkeys(filter(None, said))) if trigger else []


def own_prompts(cfg: FinetuneConfig, classes: list[str]) -> tuple[list[str], list[str]]:
    """(to measure forgetting by, to keep in training): own_prompts, and of `class_prompts` as many, and half as many.

    Without the class among them, whatever is like the subject becomes the subject (DreamBooth, arXiv:2208.12242)."""
    own, count = cfg.own_prompts, cfg.prior_pictures if cfg.prior else 0
    share = count // CLASS_SHARE if classes else 0
    of_class = [classes[k * len(classes) // share] for k in range(share)]
    kept = [own[k % len(own)] for k in range(count - share)]
    return own + classes[:: -(-len(classes) // len(own)) or 1], kept + of_class


def own_pictures(
    pipe: DiffusionFMPipeline,
    cfg: FinetuneConfig,
    train: list[Sample],
    known: dict[str, Tensor] | None,
    say: Say,
) -> tuple[list[Sample], list[Sample]]:
    """(to measure forgetting by, to keep in training): pictures that the base model draws of its own prompts.

    train: whose captions tell the subject's class. known: the latents as a session before kept them, so that a run
    goes on with the same ones."""
    classes = class_prompts(train, cfg.trigger)
    measured, kept = own_prompts(cfg, classes)
    prompts, seeds = measured + kept, [0] * len(measured) + [PRIOR_SEED + k for k in range(len(kept))]
    if known is None or len(known["latent"]) != len(prompts):
        more = f" and of {classes[0]!r} and the like" if classes else ""
        say(f"drawing {len(prompts)} pictures of the model's own prompts{more}, to see what it forgets")
        if cfg.trigger and kept and not classes:
            say(
                f"no caption names what {cfg.trigger} is: say 'a dog of {TRIGGER}', or every dog may become it"
            )
        size = pipe.defaults["height"]
        latents = to_latents(pipe, [_pixels(p, size) for p in pipe(prompts, seed=seeds).images])
    else:
        latents = known["latent"]
    samples = [
        {"key": f"own/{k:04d}", "latent": latent, "captions": [prompt], "heldout": False, "own": True}
        for k, (prompt, latent) in enumerate(zip(prompts, latents, strict=True))
    ]
    return samples[: len(measured)], samples[len(measured) :]


def keep_own(out: Path, own: list[Sample], prior: list[Sample]) -> None:
    """Keep the latents of `own_pictures` in the run folder."""
    write_weights(out / OWN, {"latent": torch.stack([sample["latent"] for sample in [*own, *prior]])})


def mixture(train: list[Sample], prior: list[Sample], weight: float) -> list[float] | None:
    """How often each sample comes an epoch: prior pictures together `weight` times as often as the others."""
    return [1.0] * len(train) + [weight * len(train) / len(prior)] * len(prior) if prior else None
