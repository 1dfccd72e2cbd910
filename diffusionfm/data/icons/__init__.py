"""The open-icons corpus: open emoji, icons and clip art from packages, rendered, captioned and packed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from diffusionfm.colors import COLORS
from diffusionfm.data.icons import captions as cap
from diffusionfm.data.icons import sources as src
from diffusionfm.data.icons.compose import ComposeConfig, Composer
from diffusionfm.data.icons.fetch import Package, fetch
from diffusionfm.data.icons.names import EmojiNames
from diffusionfm.data.icons.render import edge_color, fingerprint, inked, on_color, render
from diffusionfm.data.icons.wordnet import WordNet


@dataclass
class CorpusConfig:
    """Keys of `configs/data/icons.yaml`, where each is explained."""

    packages: dict[str, dict]
    sources: dict[str, dict]
    size: int = 128
    seed: int = 0
    held_out: float = 0.02
    backgrounds: float = 0.35
    skin_tones: float = 0.125
    samples_per_shard: int = 2048
    synonyms: dict[str, str] = field(default_factory=dict)
    compositions: ComposeConfig | None = None
    vectors_only: bool = False
    limit: int | None = None


@dataclass
class BuildReport:
    """What a build made and left out."""

    pictures: int = 0
    samples: int = 0
    left_out: Counter = field(default_factory=Counter)


def load_corpus_config(path: str | Path) -> CorpusConfig:
    """The corpus description in a YAML file; `ValueError` names an unknown key or a missing package."""
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping with `packages` and `sources`")
    unknown = set(data) - set(CorpusConfig.__dataclass_fields__)
    if unknown or not {"packages", "sources"} <= set(data):
        raise ValueError(f"{path}: unknown or missing keys {sorted(unknown) or ['packages', 'sources']}")
    if "compositions" in data:
        try:
            data["compositions"] = ComposeConfig(**data["compositions"])
        except TypeError as error:
            raise ValueError(f"{path}: compositions: {error}") from error
    config = CorpusConfig(**data)
    for name, options in config.sources.items():
        if options.get("package", "iconify") not in config.packages:
            raise ValueError(f"{path}: source {name} names a package that `packages` lacks")
    return config


def drawings(config: CorpusConfig) -> Iterator[tuple[src.Drawing, Package]]:
    """Every drawing of every source in the order of the config, with its package."""
    packages = {key: Package(**value) for key, value in config.packages.items()}
    folders = {key: fetch(package) for key, package in packages.items()}
    emoji = EmojiNames.load(folders["emojibase"], folders["emojilib"])
    wordnet = None
    if config.synonyms:
        reserved = Path(config.synonyms["reserved"]).read_text(encoding="utf-8").splitlines()
        wordnet = WordNet(folders[config.synonyms["package"]], reserved)
    for source, options in config.sources.items():
        key = options.get("package", "iconify")
        folder = folders[key]
        if options["kind"] == "clipart":
            found = src.clipart(folder, source, options)
        elif key == "iconify":
            found = src.iconify(folder, source, options, emoji, config.skin_tones)
        else:
            found = src.emoji_renders(folder, source, options, emoji, config.skin_tones)
        for drawing in found:
            if drawing.licence not in src.LICENCES:
                raise ValueError(
                    f"source {source}: licence {drawing.licence!r} is not a permissive one; leave it out"
                )
            yield (
                (replace(drawing, words=wordnet.enrich(drawing.words)) if wordnet else drawing),
                packages[key],
            )


def samples(
    config: CorpusConfig,
    report: BuildReport,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
    """(key, RGBA picture, caption, metadata) of the whole corpus, duplicates and empty drawings left out."""
    found = list(drawings(config))
    composer = config.compositions and Composer(config.compositions, config.size, config.seed)
    order = np.random.default_rng(config.seed).permutation(len(found))  # shards mix all sources
    if config.vectors_only:
        order = order[[not found[i][0].is_raster for i in order]]
    order = order[: config.limit]
    seen: set[bytes] = set()
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        pictures = pool.map(render, (found[i][0] for i in order), [config.size] * len(order), chunksize=64)
        for done, (index, picture) in enumerate(zip(order, pictures, strict=True), start=1):
            drawing, package = found[index]
            if progress is not None:
                progress(done, len(order))
            if picture is None:
                report.left_out["nothing drawn"] += 1
                continue
            print_ = fingerprint(picture)
            if print_ in seen:
                report.left_out["duplicate"] += 1
                continue
            seen.add(print_)
            report.pictures += 1
            for sample in _variants(drawing, package, picture, config):
                report.samples += 1
                yield sample
                if composer and sample[3]["background"] is None:
                    composer.offer(sample[1], sample[3])
    for sample in composer.samples() if composer else ():
        report.samples += 1
        yield sample


def _variants(
    drawing: src.Drawing, package: Package, picture: Image.Image, config: CorpusConfig
) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
    """A drawing's samples: transparent always, and for a share of them on a coloured background too."""
    identity = f"{drawing.source}/{drawing.name}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    rng = np.random.default_rng([config.seed, int(digest[:8], 16)])
    ink = cap.pick_ink(identity, rng) if drawing.palette == "mono" else None
    if ink is not None:
        picture = inked(picture, ink)
    held = cap.is_held_out(drawing.words.phrase, config.held_out)
    backgrounds: list[str | None] = [None]
    if src.share(f"background:{identity}") < config.backgrounds:
        backgrounds.append(cap.pick_background(edge_color(picture), rng))
    for background in backgrounds:
        texts = cap.captions(drawing.words, drawing.style, ink, background, config.held_out, held)
        meta = {
            "source": drawing.source,
            "package": package.name,
            "version": package.version,
            "licence": drawing.licence,
            "attribution": drawing.attribution,
            "name": drawing.name,
            "phrase": drawing.words.phrase,
            "keywords": list(drawing.words.keywords),
            "style": drawing.style,
            "palette": drawing.palette,
            "background": background,
            "background_hex": COLORS[background] if background else None,
            "ink": ink,
            "ink_hex": COLORS[ink] if ink else None,
            "split": "heldout" if held else "train",
            "captions": texts,
        }
        image = on_color(picture, background) if background else picture
        yield digest[:16] + ("b" if background else "a"), image, texts[0], meta


def build(
    config_path: str | Path,
    out: str | Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> BuildReport:
    """Fetch, render, caption and pack the corpus that a YAML file describes into shards at `out`.

    changes: keys of `CorpusConfig` to set over the file's."""
    from diffusionfm.data.shards import ShardWriter

    config = replace(load_corpus_config(config_path), **changes)
    report = BuildReport()
    with ShardWriter(out, samples_per_shard=config.samples_per_shard) as writer:
        for key, picture, caption, meta in samples(config, report, workers, progress):
            writer.write(key, picture, caption, meta)
    return report
