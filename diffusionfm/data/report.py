"""What lies in a folder of shards: counts, a contact sheet, the check of every hash, ATTRIBUTION.md, words."""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffusionfm.data.order import Order
from diffusionfm.data.reader import PICTURES, BadSample, ShardDataset, decode_picture, told_captions
from diffusionfm.data.shards import shard_paths
from diffusionfm.inputs import DECODE_ERRORS
from diffusionfm.vocabulary import learned_words, well_known

COUNTED = ("source", "licence", "style", "palette", "split", "background")
Progress = Callable[[int, int], None]


def inspect_shards(
    folder: str | os.PathLike,
    out_png: str | os.PathLike | None = None,
    pictures: int = 48,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{"samples", "distinct" (pictures, by sha256), "shards", "bytes", "problems"} and, for each name of
    COUNTED, {value: count}, most first, "none" where absent.

    out_png: where a contact sheet of `pictures` samples with their captions goes, the sources in turn.
    ValueError, with the fix, for a folder without shards."""
    dataset = ShardDataset(folder, needs=())
    counts: dict[str, Counter] = {name: Counter() for name in COUNTED}
    distinct, metas = set(), _metas(dataset, progress)
    for meta in metas:
        distinct.add(meta.get("sha256", meta["key"]))
        for name in COUNTED:
            value = meta.get(name)
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "none")
            counts[name][text] += 1
    if out_png is not None:
        by_source: dict[str, list[int]] = defaultdict(list)
        for i in Order(len(dataset), seed=0).epoch(0).tolist():
            by_source[str(metas[i].get("source"))].append(i)
        turns = [queue[k] for k in range(pictures) for queue in by_source.values() if k < len(queue)]
        contact_sheet(dataset, turns[:pictures]).save(out_png)
    return {
        "samples": len(dataset),
        "distinct": len(distinct),
        "shards": len(dataset.paths),
        "bytes": sum(path.stat().st_size for path in dataset.paths),
        "problems": dataset.problems,
        **{name: dict(counter.most_common()) for name, counter in counts.items()},
    }


def verify_shards(folder: str | os.PathLike, progress: Progress | None = None) -> list[str]:
    """All that is wrong with a folder of shards, a line each, [] when nothing is.

    Tars must be readable and whole, members complete, keys unique, pictures decodable, hashes equal to those
    in JSON and parquet, counts equal to the stats. ValueError, with the fix, for a folder without shards."""
    paths = shard_paths(folder)
    problems: list[str] = []
    keys: dict[str, str] = {}
    for done, path in enumerate(paths):
        problems += _verify_shard(path, keys)
        if progress:
            progress(done + 1, len(paths))
    for path in sorted(Path(folder).glob("*.parquet")):
        if not path.with_suffix(".tar").exists():
            problems.append(f"{path.name}: its shard, {path.stem}.tar, is missing")
    return problems


def attribution(folder: str | os.PathLike, progress: Progress | None = None) -> str:
    """ATTRIBUTION.md of a folder of shards: the licences with their totals, then a section a source."""
    metas = _metas(ShardDataset(folder, needs=()), progress)
    licences = Counter(meta.get("licence") or "not stated" for meta in metas)
    say = lambda meta, name: str(meta.get(name) or "not stated")  # noqa: E731
    credits: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    for meta in metas:
        credits[tuple(say(meta, n) for n in ("source", "package", "version", "licence"))][
            say(meta, "attribution")
        ] += 1
    lines = ["# Attribution", "", f"The {len(metas):,} pictures of this corpus come from these sources.", ""]
    lines += ["| licence | pictures |", "|---|---:|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(licences.items())]
    for (source, package, version, licence), people in sorted(credits.items()):
        lines += [
            "",
            f"## {source}",
            "",
            f"* package: {package}",
            f"* version: {version}",
            f"* licence: {licence}",
        ]
        lines += [f"* pictures: {people.total():,}"]
        if len(people) == 1:
            lines.append(f"* attribution: {next(iter(people))}")
        else:
            lines.append("* attribution, with pictures each:")
            lines += [f"  * {html.unescape(who)}: {n:,}" for who, n in sorted(people.items())]
    return "\n".join(lines) + "\n"


def trained_words(folder: str | os.PathLike, progress: Progress | None = None) -> list[str]:
    """The words that a model learns of a folder of shards, for its words.txt; held-out samples teach none."""
    dataset = ShardDataset(folder, needs=("txt",))
    metas = enumerate(_metas(dataset, progress))
    seen = ((i, meta) for i, meta in metas if meta.get("split") != "heldout")
    return learned_words(told_captions(meta) or [dataset.caption(i)] for i, meta in seen)


def trained_phrases(folder: str | os.PathLike) -> dict[str, tuple[int, list[str]]]:
    """The phrases that a model comes to know well of a folder of shards, three sources or more draw them: how many do,
    and all captions of each, the most frequent first.

    Held-out samples teach none, and compositions none of their own."""
    told = ShardDataset(folder, split="train").columns("source", "phrase", "captions")
    own = [(source, phrase, texts) for source, phrase, texts in told if phrase and source != "composed"]
    known = well_known((source, phrase) for source, phrase, _ in own)
    sources: dict[str, set[str]] = {phrase: set() for phrase in known}
    captions: dict[str, Counter[str]] = {phrase: Counter() for phrase in known}
    for source, phrase, texts in own:
        if phrase in sources:
            sources[phrase].add(source)
            captions[phrase].update(texts or [])
    return {
        phrase: (len(sources[phrase]), [text for text, _ in captions[phrase].most_common()])
        for phrase in known
    }


def contact_sheet(dataset: ShardDataset, indices: list[int], columns: int = 8) -> Image.Image:
    """Samples in rows, RGB: each over a checkerboard, its caption under it, a bad one crossed out."""
    font = ImageFont.load_default(13)
    cell, line, lines = 160, 16, 4
    columns = min(columns, len(indices))
    high = cell + line * lines + 12
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12) + 12, rows * high + 12), "white")
    pen = ImageDraw.Draw(sheet)
    board = _checkerboard(cell)
    for n, i in enumerate(indices):
        x, y = 12 + n % columns * (cell + 12), 12 + n // columns * high
        sheet.paste(board, (x, y))
        try:
            sample = dataset.raw(i)
            data = next(sample[extension] for extension in PICTURES if extension in sample)
            picture = decode_picture(data)
            picture = picture.resize(_fit(picture.size, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2), picture)
        except (*DECODE_ERRORS, StopIteration):
            pen.line((x, y, x + cell, y + cell), fill="red", width=3)
        caption = dataset.caption(i) if "txt" in dataset.members(i) else "(no caption)"
        for k, text in enumerate(_wrap(caption, font, cell, lines)):
            pen.text((x, y + cell + 3 + k * line), text, fill="black", font=font)
    return sheet


def _verify_shard(path: Path, keys: dict[str, str]) -> list[str]:
    try:
        dataset = ShardDataset(path, needs=())
    except ValueError as error:
        return [str(error)]
    problems = list(dataset.problems)
    hashes: dict[str, str] = {}
    for i in range(len(dataset)):
        key = dataset.key(i)
        if key in keys:
            problems.append(f"{path.name}: {key}: already in {keys[key]}")
        keys.setdefault(key, path.name)
        hashes[key], wrong = _verify_sample(dataset, i)
        problems += [f"{path.name}: {key}: {text}" for text in wrong]
    return problems + _verify_manifest(path, hashes) + _verify_stats(path, len(hashes))


def _verify_sample(dataset: ShardDataset, i: int) -> tuple[str, list[str]]:
    """The sha256 of a sample's picture (or latents), and what is wrong with the sample."""
    try:
        members, meta = dataset.raw(i), dataset.meta(i)
    except BadSample as error:
        return "", [str(error)]
    problems = [f"no {name}" for name in ("txt", "json") if name not in members]
    if not members.get("txt", b"x").strip():
        problems.append("empty caption")
    content = next((extension for extension in (*PICTURES, "safetensors") if extension in members), None)
    if content is None:
        return "", [*problems, "no picture"]
    digest = hashlib.sha256(members[content]).hexdigest()
    if "json" in members and meta.get("sha256") != digest:
        problems.append(f"the {content} does not have the sha256 that its json tells")
    if content in PICTURES:
        try:
            picture = decode_picture(members[content])
            if meta and (meta.get("width"), meta.get("height")) != picture.size:
                problems.append(f"{picture.width}x{picture.height} pixels, its json tells another size")
        except DECODE_ERRORS as error:
            problems.append(f"undecodable picture: {error}")
    return digest, problems


def _verify_manifest(path: Path, hashes: dict[str, str]) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    manifest = path.with_suffix(".parquet")
    try:
        table = pyarrow.parquet.read_table(manifest, columns=["key", "sha256", "status"]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        return [f"{manifest.name}: {'missing' if not manifest.exists() else f'unreadable: {error}'}"]
    told = {row.get("key"): row.get("sha256") for row in table if row.get("status") == "success"}
    problems = [f"{manifest.name}: {key}: not in {path.name}" for key in told.keys() - hashes.keys()]
    problems += [f"{manifest.name}: {key}: not listed" for key in hashes.keys() - told.keys()]
    both = told.keys() & hashes.keys()
    problems += [f"{manifest.name}: {key}: another sha256" for key in both if told[key] != hashes[key]]
    return sorted(problems)


def _verify_stats(path: Path, count: int) -> list[str]:
    file = path.with_name(f"{path.stem}_stats.json")
    try:
        stats = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{file.name}: {'missing' if not file.exists() else f'unreadable: {error}'}"]
    told = stats.get("successes") if isinstance(stats, dict) else None
    return [] if told == count else [f"{file.name}: tells {told} samples, the shard has {count}"]


def _metas(dataset: ShardDataset, progress: Progress | None) -> list[dict[str, Any]]:
    """The JSON of every sample, {"key"} alone where it is broken, which `dataset.problems` then names."""
    metas: list[dict[str, Any]] = []
    for i in range(len(dataset)):
        try:
            metas.append({"key": dataset.key(i), **dataset.meta(i)})
        except BadSample as error:
            dataset.problems.append(str(error))
            metas.append({"key": dataset.key(i)})
        if progress and (i % 1000 == 999 or i + 1 == len(dataset)):
            progress(i + 1, len(dataset))
    return metas


def _checkerboard(size: int, square: int = 10) -> Image.Image:
    board = Image.new("RGB", (size, size), "#ffffff")
    pen = ImageDraw.Draw(board)
    for y in range(0, size, square):
        for x in range(y // square % 2 * square, size, 2 * square):
            pen.rectangle((x, y, x + square - 1, y + square - 1), fill="#dddddd")
    return board


def _fit(size: tuple[int, int], cell: int) -> tuple[int, int]:
    return max(1, round(size[0] * cell / max(size))), max(1, round(size[1] * cell / max(size)))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Text in at most `lines` lines of `width` pixels, broken between words, cut with '...'."""
    rows, row = [], ""
    words = text.split()
    for word in words:
        longer = f"{row} {word}".strip()
        if row and font.getlength(longer) > width:
            rows.append(row)
            longer = word
        row = longer
    rows.append(row)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " ..."]
    cut = []
    for row in rows:
        while font.getlength(row) > width and len(row) > 4:
            row = row.removesuffix("...")[:-1] + "..."
        cut.append(row)
    return cut
