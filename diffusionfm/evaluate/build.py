"""Make the instrument's assets from the corpus: python -m diffusionfm.evaluate.build data/icons

Run it when the corpus changes, and raise `protocol.VERSION` with it. Describing the corpus takes a quarter of an
hour on a core and is kept in --cache.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from diffusionfm.config import user_errors
from diffusionfm.data.icons.sources import share
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import captions_of
from diffusionfm.evaluate.assets import FILES, FOLDER
from diffusionfm.evaluate.corpus import Corpus, read_corpus
from diffusionfm.evaluate.fit import fit_maps, phrase_features
from diffusionfm.evaluate.judge import Judge, Views
from diffusionfm.evaluate.memory import build_index
from diffusionfm.evaluate.protocol import spread
from diffusionfm.evaluate.words import OWN_WORDS, PEOPLE_WORDS, unseen_candidates
from diffusionfm.images import write_atomic

TAUGHT = 200  # training phrases that are drawn and recognised
HELD_OUT = 220  # held-out phrases that are
PHRASES = 500  # among which each is recognised
UNSEEN = 200
LIKENESS, PIXELS = 32, 16  # coordinates
PARTS = 16  # bytes of a picture in each index
CLOSEST = 0.01  # of held-out pictures are nearer to a training picture than a near-copy is
LIMIT = 5_000_000  # bytes of all assets


def main(argv: list[str] | None = None) -> None:
    """Describe, fit, index, write; prints what was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="the corpus that `diffusionfm shards build` made")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: the package's own assets")
    parser.add_argument("--cache", type=Path, default=Path("runs/evaluate"), help="default: runs/evaluate")
    args = parser.parse_args(argv)
    with user_errors():
        print(json.dumps(build(args.shards, args.out, args.cache), indent=1))


def build(shards: str, out: Path, cache: Path) -> dict[str, Any]:
    """Write the assets; returns what they hold. `ValueError` when they do not fit or a phrase is missing."""
    corpus, dataset = read_corpus(shards, cache), ShardDataset(shards)
    train, (shown, reference) = corpus.of("train"), halves(corpus)
    chosen = choose_phrases(corpus, train, shown) | choose_prompts(dataset)
    kept, copied = probes(corpus, train, chosen["taught"])
    judge = fit(corpus, train, {*kept}, chosen["phrases"], cache)
    views = judge.views(corpus.seen)
    indices = {name: build_index(getattr(views, name)[train], PARTS) for name in ("likeness", "pixels")}
    near = {
        name: index.nearest(getattr(views, name)[[*shown, *reference, *copied]])[0]
        for name, index in indices.items()
    }
    unseen = len(shown) + len(reference)
    thresholds = {name: float(np.quantile(distance[:unseen], CLOSEST)) for name, distance in near.items()}
    arrays = dict(judge.arrays, reference=views.likeness[reference].astype(np.float16))
    for name, index in indices.items():
        arrays |= {f"index.{name}.codes": index.codes, f"index.{name}.centres": index.centres}
    for name, rows in {"kept": kept, "copied": copied}.items():
        arrays |= {f"{name}.{key}": value.astype(np.float16) for key, value in vars(views.take(rows)).items()}
    pictures = [dataset[corpus.numbers[i]] for i in shown]
    webp = [encode(sample["picture"]) for sample in pictures]
    arrays["webp_ends"] = np.cumsum([len(data) for data in webp]).astype(np.int64)
    words = {
        "corpus": dataset.fingerprint,
        "training_pictures": len(train),
        "held_out": [told(sample) for sample in pictures],
        **chosen,
        "thresholds": thresholds,
    }
    write(out, words, arrays, webp)
    return {
        "bytes": {name: (out / name).stat().st_size for name in FILES},
        "held_out": len(shown),
        "reference": len(reference),
        "training_pictures": len(train),
        **recognised(judge, views, corpus, reference),
        "thresholds": thresholds,
        "copies_found": {name: float((near[name][unseen:] < thresholds[name]).mean()) for name in near},
    }


# ------------------------------------------------------------------ which pictures and phrases


def halves(corpus: Corpus) -> tuple[list[int], list[int]]:
    """The held-out pictures in two halves with the same phrases and sources: one ships, one is compared with."""
    rows = sorted(corpus.of("heldout"), key=lambda i: (corpus.rows[i]["phrase"], corpus.rows[i]["source"], i))
    return rows[::2], rows[1::2]


def choose_phrases(corpus: Corpus, train: list[int], shown: list[int]) -> dict[str, Any]:
    """The phrases drawn from training ("taught") and the list of 500 among which pictures are recognised.

    `ValueError` when a phrase that words of one's own mean is not in the corpus.
    """
    drawn_by = defaultdict(set)
    for i in train:
        drawn_by[corpus.rows[i]["phrase"]].add(corpus.rows[i]["source"])
    common = sorted(drawn_by, key=lambda phrase: (-len(drawn_by[phrase]), phrase))
    missing = sorted({*OWN_WORDS.values(), *PEOPLE_WORDS} - {p for p in drawn_by if len(drawn_by[p]) > 1})
    if missing:
        raise ValueError(f"fewer than two sources draw {', '.join(missing)}: choose other words in words.py")
    taught = list(dict.fromkeys([*OWN_WORDS.values(), *common]))[:TAUGHT]
    unseen = list(dict.fromkeys(corpus.rows[i]["phrase"] for i in shown))
    held_out = sorted(unseen, key=lambda phrase: share(f"list:{phrase}"))[:HELD_OUT]
    phrases = list(dict.fromkeys([*taught, *held_out, *PEOPLE_WORDS, *common]))[:PHRASES]
    return {"phrases": phrases, "taught": taught}


def probes(corpus: Corpus, train: list[int], taught: list[str]) -> tuple[list[int], list[int]]:
    """For each taught phrase two training pictures: one that the judge is not fitted to, one to hand back."""
    found: dict[str, list[int]] = defaultdict(list)
    for i in sorted(train, key=lambda i: share(f"probe:{corpus.numbers[i]}")):
        found[corpus.rows[i]["phrase"]].append(i)
    return [found[phrase][0] for phrase in taught], [found[phrase][1] for phrase in taught]


def choose_prompts(dataset: ShardDataset) -> dict[str, Any]:
    """Prompts that are nobody's caption. `ValueError` for words of one's own that are one after all."""
    samples = ({"meta": dataset.meta(i), "caption": dataset.caption(i)} for i in range(len(dataset)))
    captions = {text for sample in samples for text in captions_of(sample)}
    bare = {prompt: re.sub(r"^(a|an) ", "", prompt) for prompt in OWN_WORDS}
    if known := [prompt for prompt in OWN_WORDS if {prompt, bare[prompt]} & captions]:
        raise ValueError(f"already captions, so no words of one's own: {', '.join(known)}; change words.py")
    unseen = [prompt for prompt in unseen_candidates() if prompt not in captions]
    return {"own_words": OWN_WORDS, "unseen": spread(unseen, UNSEEN)}


# ------------------------------------------------------------------ what is fitted


def fit(corpus: Corpus, train: list[int], kept: set[int], listed: list[str], cache: Path) -> Judge:
    """The judge, fitted to all training pictures but those kept from it; its arrays are float16."""
    phrases = sorted({row["phrase"] for row in corpus.rows})
    texts = phrase_features(phrases, cache)
    number = {phrase: k for k, phrase in enumerate(phrases)}
    rows = [i for i in train if i not in kept]
    of = np.array([number[corpus.rows[i]["phrase"]] for i in rows])
    maps = fit_maps(corpus.seen.features[rows], texts, of)
    weight = (maps.picture.weight / maps.std).numpy().T
    places = maps.texts(torch.from_numpy(texts[[number[phrase] for phrase in listed]]))
    arrays = {
        "map.mean": maps.mean.numpy(),
        "map.meaning": weight / np.abs(weight).max(),  # only the direction counts
        "map.likeness": axes(corpus.seen.features[train], LIKENESS),
        "map.pixel_mean": corpus.seen.coarse[train].mean(0),
        "map.pixels": axes(corpus.seen.coarse[train], PIXELS),
        "phrases": places.numpy(),
    }
    return Judge({name: value.astype(np.float16) for name, value in arrays.items()}, listed)


def axes(vectors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The main axes of vectors (n, d), turned at random among themselves so that all matter alike: (d, count)."""
    _, found = np.linalg.eigh(np.cov(vectors[:: max(1, len(vectors) // 10_000)], rowvar=False))
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, count)))
    return found[:, -count:] @ turn


# ------------------------------------------------------------------ files


def encode(picture: Any) -> bytes:
    """Lossless WebP: a third smaller than the corpus keeps it."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def told(sample: dict[str, Any]) -> dict[str, str]:
    """What the assets tell of a picture; its licence wants the attribution."""
    meta = sample["meta"]
    return {
        "caption": sample["caption"],
        **{name: meta[name] for name in ("phrase", "source", "licence", "attribution")},
    }


def write(out: Path, words: dict[str, Any], arrays: dict[str, np.ndarray], webp: list[bytes]) -> None:
    """Write the three files; `ValueError` when they are over 5 MB."""
    data = {
        FILES[0]: save({"webp": np.frombuffer(b"".join(webp), np.uint8)}),
        FILES[1]: save({name: np.ascontiguousarray(value) for name, value in arrays.items()}),
        FILES[2]: json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    if (total := sum(map(len, data.values()))) > LIMIT:
        raise ValueError(f"the assets are {total:,} bytes, more than {LIMIT:,}: keep fewer pictures")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        write_atomic(out / name, content)


def recognised(judge: Judge, views: Views, corpus: Corpus, rows: list[int]) -> dict[str, float]:
    """How the judge does on held-out pictures that do not ship."""
    known = [i for i in rows if corpus.rows[i]["phrase"] in judge.phrases]
    ranks = judge.ranks(views.take(known), [corpus.rows[i]["phrase"] for i in known])
    return {"recognised_first": float((ranks == 0).mean()), "among_five": float((ranks < 5).mean())}


if __name__ == "__main__":
    main()
