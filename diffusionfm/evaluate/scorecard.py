"""Draw the protocol's pictures with a model, judge them and the controls alike, and put figures side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffusionfm import __version__
from diffusionfm.checkpoint import weights_hash
from diffusionfm.evaluate.assets import FOLDER, load_assets
from diffusionfm.evaluate.controls import COPIED, Bench, claims, control_columns
from diffusionfm.evaluate.inception import Inception, load_inception
from diffusionfm.evaluate.judge import Judge, Views
from diffusionfm.evaluate.lines import ENOUGH, Figure, distance, near_copies, people, rule_figures
from diffusionfm.evaluate.networks import autoencoder_lines, loss_lines, stacked
from diffusionfm.evaluate.protocol import VERSION, Item, protocol
from diffusionfm.evaluate.rules import LINES, RULES, verdicts
from diffusionfm.evaluate.words import PEOPLE_WORDS

if TYPE_CHECKING:
    from diffusionfm.pipeline import DiffusionFMPipeline

DRAW = 8  # pictures a call
TITLES = {
    **{f"rules.{rule}": title for rule, title in RULES.items()},
    "recognised.held_out.first": "held-out phrase recognised first of 500",
    "recognised.held_out.five": "held-out phrase among the first five",
    "recognised.taught.first": "training phrase recognised first of 500",
    "recognised.taught.five": "training phrase among the first five",
    "recognised.own_words.first": "words of one's own: meaning recognised first of 500",
    "recognised.own_words.five": "words of one's own: meaning among the first five",
    "likeness": "Fréchet distance to held-out pictures",
    "fid": "FID to held-out pictures, halves of them",
    "copies.unseen.features": "unseen combinations: near-copies by features",
    "copies.unseen.pixels": "unseen combinations: near-copies by pixels",
    "copies.held_out.features": "held-out phrases: near-copies by features",
    "copies.held_out.pixels": "held-out phrases: near-copies by pixels",
    "copies.taught.features": "training phrases: near-copies by features",
    "copies.taught.pixels": "training phrases: near-copies by pixels",
    "unique": "pictures with no twin among the others",
    "psnr_white": "autoencoder: PSNR on white, dB",
    "psnr_black": "autoencoder: PSNR on black, dB",
    "alpha_error": "autoencoder: mean error of alpha",
    "loss": "denoiser: held-out velocity loss at fixed times",
}
LOWER = ("likeness", "fid", "copies.", "alpha_error", "loss")
"""Figures that are better when lower begin so."""


@dataclass
class Scorecard:
    """report: JSON-able. The rest tells of each picture: what it was drawn for, whether it holds, what it is like.

    read: what each prompt was read as, "" where it was read as it stands."""

    report: dict[str, Any]
    items: list[Item]
    pictures: list[Image.Image]
    right: list[bool | None]
    nearest: list[str]
    read: list[str]


def evaluate(
    pipe: DiffusionFMPipeline,
    quick: bool = False,
    assets: Path = FOLDER,
    progress: Callable[[int, int], None] | None = None,
    inception: Path | None = None,
) -> Scorecard:
    """Run the protocol on a pipeline.

    quick: an even share of each section, a few minutes; intervals are wide and there is no Fréchet distance.
    progress(done, total) counts pictures drawn. inception: weights (`load_inception`) to report FID by as well.
    `ValueError` for a model without alpha, a missing package, or weights that are others.
    """
    if pipe.vae.channels != 4:
        raise ValueError(
            "the scorecard judges models of transparent pictures, and this model's autoencoder knows no alpha"
        )
    start = time.monotonic()
    loaded = load_assets(assets)
    plan = protocol(loaded.words, loaded.digest, quick)
    if inception and (count := len(plan.numbers("held_out"))) < 2 * ENOUGH:
        raise ValueError(
            f"FID needs {2 * ENOUGH} held-out pictures, not {count}: leave out --quick, or --inception"
        )
    network = inception and load_inception(inception)
    bench = Bench(plan, loaded)
    judge = bench.judge
    pictures = draw(pipe, plan.items, progress)
    drawn = time.monotonic()
    read = ["" if (words := pipe.read_as(item.prompt)) == item.prompt else words for item in plan.items]
    views = judge.see(pictures)
    columns = {"model": model_column(bench, pictures, views), **control_columns(bench)}
    columns["model"] |= network_figures(pipe, bench)
    if network:
        for column, figure in fid(network, bench, pictures).items():
            columns[column]["fid"] = figure
    sound = claims(columns)
    numbers = plan.numbers("people")
    prompts = [plan.items[k].prompt for k in numbers]
    report = {
        "protocol": {
            "version": VERSION,
            "hash": plan.digest,
            "quick": quick,
            "pictures": len(plan.items),
            "training_pictures": loaded.words["training_pictures"],
        },
        "model": described(pipe),
        "version": __version__,
        "date": date.today().isoformat(),
        "lines": rows(columns),
        "sound": all(claim["holds"] for claim in sound),
        "complaints": [claim["claim"] for claim in sound if not claim["holds"]],
        "claims": [claim["claim"] for claim in sound],
        "read_as": {item.prompt: words for item, words in zip(plan.items, read, strict=True) if words},
        "copies": copied(bench, views),
        "people": people(judge, views.take(numbers), prompts, PEOPLE_WORDS),
        "seconds": {"drawing": round(drawn - start, 1), "all": round(time.monotonic() - start, 1)},
    }
    right = [is_right(judge, item, pictures[k], views.take([k])) for k, item in enumerate(plan.items)]
    return Scorecard(report, plan.items, pictures, right, judge.nearest(views), read)


def described(pipe: DiffusionFMPipeline) -> dict[str, Any]:
    """What a report says of its model: weights, size, the denoiser's precision, where it ran, the phrasebook that read
    the prompts, and its settings."""
    networks = (pipe.vae, pipe.text_encoder, pipe.transformer)
    return {
        "name": pipe.model_name,
        "fingerprint": pipe.fingerprint(),
        "vae_hash": weights_hash(pipe.vae),
        "parameters": sum(weight.numel() for network in networks for weight in network.parameters()),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "fast": pipe.fast,
        "phrasebook": pipe.phrasebook.digest if pipe.phrasebook else "",
        **pipe.defaults,
    }


def copied(bench: Bench, views: Views) -> list[dict[str, Any]]:
    """The model's near-copies: what each was drawn for, and the training picture it is near."""
    plan = bench.protocol
    numbers = [k for section in COPIED for k in plan.numbers(section)]
    found = []
    for near in near_copies(views.take(numbers), bench.indices, bench.thresholds):
        item = plan.items[numbers[near.pop("picture")]]
        found.append({"section": item.section, "prompt": item.prompt, "seed": item.seed, **near})
    return found


def is_right(judge: Judge, item: Item, picture: Image.Image, view: Views) -> bool | None:
    """Whether a picture keeps its rules or is recognised first; None where neither is asked."""
    if item.scene is not None:
        return all(verdicts(item.section, item.scene, picture).values())
    return None if item.truth is None else bool(judge.ranks(view, [item.truth])[0] == 0)


def network_figures(pipe: DiffusionFMPipeline, bench: Bench) -> dict[str, Any]:
    """The autoencoder's and the denoiser's figures on the held-out pictures of the protocol."""
    size = pipe.defaults["width"], pipe.defaults["height"]
    held_out = stacked([bench.real[row] for row in bench.real_rows], size)
    captions = [str(bench.assets.words["held_out"][row]["caption"]) for row in bench.real_rows]
    return autoencoder_lines(pipe.vae, held_out) | loss_lines(pipe, held_out, captions)


def fid(network: Inception, bench: Bench, pictures: list[Image.Image]) -> dict[str, Figure | None]:
    """Column -> FID to one half of the held-out pictures: of those drawn for the other half, the real and blank ones.

    All are of as many pictures, since FID reads higher the fewer there are.
    """
    drawn = network.see(pictures[k] for k in bench.protocol.numbers("held_out")[::2])
    real = network.see(bench.real.values())
    blank = np.repeat(network.see([Image.new("RGBA", (128, 128))]), len(real[::2]), axis=0)
    columns = {"model": drawn, "real": real[::2], "blank": blank}
    return {column: distance(features, real[1::2]) for column, features in columns.items()}


def draw(
    pipe: DiffusionFMPipeline, items: list[Item], progress: Callable[[int, int], None] | None
) -> list[Image.Image]:
    """A picture for each item, by the model's own settings."""
    pictures: list[Image.Image] = []
    for start in range(0, len(items), DRAW):
        group = items[start : start + DRAW]
        pictures += pipe([item.prompt for item in group], seed=[item.seed for item in group]).images
        if progress is not None:
            progress(len(pictures), len(items))
    return pictures


def model_column(bench: Bench, pictures: list[Image.Image], views: Views) -> dict[str, Any]:
    """The figures of the model's own pictures."""
    plan = bench.protocol
    found: dict[str, Any] = {}
    for line in LINES:
        numbers = plan.numbers(line)
        figures = rule_figures([plan.items[k] for k in numbers], [pictures[k] for k in numbers])
        found |= {f"rules.{rule}": figure for rule, figure in figures.items()}
    numbers_of = {section: plan.numbers(section) for section in ("held_out", "taught", "own_words", "unseen")}
    items = {section: [plan.items[k] for k in numbers] for section, numbers in numbers_of.items()}
    return found | bench.column(
        {section: views.take(numbers) for section, numbers in numbers_of.items()}, items
    )


def rows(columns: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line -> {"title", "better", "model", and the controls that have it}; recognition also as a ratio to real."""
    found: dict[str, dict[str, Any]] = {}
    names = [*TITLES, *(name for name in columns["model"] if name not in TITLES)]
    for name in [name for name in names if name in columns["model"]]:
        line: dict[str, Any] = {
            "title": TITLES.get(name, f"denoiser: loss at t = {name.removeprefix('loss_t')}"),
            "better": "lower" if name.startswith(LOWER) else "higher",
        }
        line |= {column: figures[name] for column, figures in columns.items() if name in figures}
        if name.startswith("recognised.") and line["real"]["share"]:
            line["of_real"] = line["model"]["share"] / line["real"]["share"]
        found[name] = line
    return found
