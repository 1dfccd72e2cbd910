"""Readers of the picture packages: each yields drawings, still unrendered, with the words that name them."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusionfm.data.icons.names import (
    NOT_A_NAME,
    TONE_SUFFIX,
    EmojiNames,
    Words,
    clean,
    is_brand,
)

LICENCES = {"public domain", "MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-3.0", "CC0-1.0"}
# Long runs of near-equal drawings (stars of every point count, jigsaw pieces): one in ten is kept.
SERIES = re.compile(r"\d+pt\d+step|shapes/jigsaw")
JUNK = re.compile(r"component|keycap|regional indicator|input symbol|^\w$|^\d+$")


@dataclass(frozen=True)
class Drawing:
    """One picture of a package before rendering: `svg` markup or a `file` to decode."""

    source: str
    name: str
    words: Words
    style: str
    palette: str
    licence: str
    attribution: str
    svg: str = ""
    file: str = ""

    @property
    def is_raster(self) -> bool:
        """Whether the drawing is made of pixels and so has a size of its own."""
        return bool(self.file) and not self.file.endswith(".svg")


def share(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: for choices that never change between builds."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def iconify(
    folder: Path, source: str, options: dict, emoji: EmojiNames, skin_tones: float
) -> Iterator[Drawing]:
    """The icons of one Iconify set (`json/NAME.json`)."""
    data = json.loads((folder / "json" / f"{source}.json").read_text(encoding="utf-8"))
    info = data["info"]
    licence = info["license"]["spdx"]
    author = info["author"]["name"]
    attribution = f"{info['name']} by {author}"
    codes = _codes_by_name(folder, source, data)
    brands = {
        n
        for c, names in data.get("categories", {}).items()
        if re.search("brand|logo", c, re.I)
        for n in names
    }
    count = 0
    for name, icon in data["icons"].items():
        if (
            icon.get("hidden")
            or name in brands
            or is_brand(name)
            or _is_duplicate_variant(source, name, data["icons"])
        ):
            continue
        if (
            TONE_SUFFIX.search(name)
            and options["kind"] == "emoji"
            and share(f"tone:{source}:{name}") >= skin_tones
        ):
            continue
        words = _words(name, options["kind"], emoji, codes.get(name))
        if words is None or JUNK.search(words.phrase) or is_brand(words.phrase):
            continue
        if options.get("limit") and count >= options["limit"]:
            return
        count += 1
        left, top = icon.get("left", data.get("left", 0)), icon.get("top", data.get("top", 0))
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        palette = options.get("palette", "color")
        yield Drawing(source, name, words, options["style"], palette, licence, attribution, svg=svg)


def _is_duplicate_variant(source: str, name: str, icons: dict) -> bool:
    """True for a size or shape variant of an icon that the set already holds."""
    if source == "fluent-color":
        stem, _, size = name.rpartition("-")
        return any(f"{stem}-{other}" in icons for other in (48, 32, 28, 24, 20, 16) if other > int(size))
    if source == "flag":
        return name.endswith("-1x1")
    return source == "healthicons" and ("24px" in name or "negative" in name)


def _codes_by_name(folder: Path, source: str, data: dict) -> dict[str, list[str]]:
    """Icon name -> code points; a set without code points borrows those of its flat sibling."""
    chars = data.get("chars")
    if not chars and source.startswith("fluent-emoji"):
        chars = json.loads((folder / "json/fluent-emoji-flat.json").read_text(encoding="utf-8")).get(
            "chars", {}
        )
    found: dict[str, list[str]] = {}
    for code, name in (chars or {}).items():
        found.setdefault(name, []).append(code)
    return found


def _words(name: str, kind: str, emoji: EmojiNames, codes: list[str] | None) -> Words | None:
    if kind == "flag":
        country = emoji.countries.get(re.sub(r"-4x3$", "", name))
        return Words(f"flag of {country}", keywords=("flag", country)) if country else None
    if kind == "emoji":
        words = emoji.find(TONE_SUFFIX.sub("", name) if not codes else name, codes)
        if words is not None:
            return words
    phrase = clean(name)
    if len(phrase) < 3 or phrase in NOT_A_NAME or len(phrase) > 60:
        return None
    return Words(phrase)


def emoji_renders(
    folder: Path, source: str, options: dict, emoji: EmojiNames, skin_tones: float
) -> Iterator[Drawing]:
    """The ready 256-pixel pictures of a package whose files are named by code point."""
    for file in sorted((folder / "assets").glob("*.webp")):
        words = emoji.find("", [file.stem])
        if words is None or JUNK.search(words.phrase):
            continue
        if words.tone and share(f"tone:{source}:{file.stem}") >= skin_tones:
            continue
        yield Drawing(
            source,
            file.stem,
            words,
            options["style"],
            "color",
            options["licence"],
            options["attribution"],
            file=str(file),
        )


def clipart(folder: Path, source: str, options: dict) -> Iterator[Drawing]:
    """Openclipart's drawings: title, keywords and author from each file's RDF; only public-domain ones."""
    root = folder / "usr/share/openclipart/svg"
    found = []
    for file in sorted(root.rglob("*.svg")):
        if (
            file.is_symlink()
            or not file.is_file()
            or "special" in file.parts
            or "signs_and_symbols/brands" in str(file)
        ):
            continue
        found.append((file, *_rdf(file)))
    repeated = {title for title, n in Counter(clean(title) for _, title, *_ in found).items() if n >= 3}
    for file, title, author, keywords, public in found:
        if not public:
            continue
        stem = (
            re.sub(r"_[a-z]+(_[a-z.]+)*_?(_\d+)?$", "", file.stem)
            if author and "_" in file.stem
            else file.stem
        )
        phrase = clean(title)
        if not phrase or phrase in repeated or len(phrase) > 48 or phrase in NOT_A_NAME:
            phrase = clean(stem)
        phrase = re.sub(r"\b(clip ?art|svg|by [a-z ]+)$", "", phrase).strip()
        if len(phrase) < 3 or phrase in NOT_A_NAME or is_brand(phrase) or is_brand(file.stem):
            continue
        if SERIES.search(str(file)) and share(f"series:{file.name}") > 0.1:
            continue
        noise = {
            clean(author),
            "",
            "externalsource",
            "clip art",
            "clipart",
            "image",
            "media",
            "png",
            "svg",
            "public domain",
        }
        names = [
            k
            for k in dict.fromkeys(clean(k) for k in keywords)
            if k not in noise and len(k) < 24 and k != phrase
        ]
        words = Words(phrase, keywords=tuple([*names, file.parent.name.replace("_", " ")][:8]))
        who = f"{author or 'unnamed author'}, Open Clip Art Library"
        yield Drawing(
            source,
            str(file.relative_to(root)),
            words,
            options["style"],
            "color",
            "public domain",
            who,
            file=str(file),
        )


def _rdf(file: Path) -> tuple[str, str, list[str], bool]:
    """(title, author, keywords, is public domain) from an SVG's RDF block; empty words when it has none."""
    text = file.read_text(encoding="utf-8", errors="replace")
    block = re.search(r"<(\w+:)?metadata.*?</(\w+:)?metadata>", text, re.S)
    if block is None or "PublicDomain" not in block.group(0).replace(" ", "").replace(
        "publicdomain", "PublicDomain"
    ):
        return "", "", [], False
    prefixes = set(re.findall(r"[<\s/](\w+):\w", block.group(0)))
    declared = "".join(f' xmlns:{p}="{p}"' for p in prefixes if p != "xmlns")
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", block.group(0))
    try:
        tree = ET.fromstring(f"<root{declared}>{body}</root>")
    except ET.ParseError:
        return "", "", [], False
    text_of = lambda path: next((e.text.strip() for e in tree.findall(path) if e.text and e.text.strip()), "")  # noqa: E731
    keywords = [e.text or "" for e in tree.iter("{rdf}li")]
    return text_of(".//{cc}Work/{dc}title"), text_of(".//{dc}creator//{dc}title"), keywords, True
