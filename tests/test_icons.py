"""The open-icons corpus: words, colours, what is left out, and a small corpus built end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusionfm.colors import COLORS, nearest, rgb
from diffusionfm.data.icons import build
from diffusionfm.data.icons import captions as cap
from diffusionfm.data.icons.fetch import Package, default_cache, fetch
from diffusionfm.data.icons.names import Words, clean, code_key, is_brand
from diffusionfm.data.icons.render import _svg, edge_color, fit, inked, on_color
from diffusionfm.data.icons.sources import share
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shapes import SHAPES, build_shapes, draw_shape, shape_samples
from diffusionfm.phrasing import article

# ---- words ----


@pytest.mark.parametrize(
    ("phrase", "with_article"),
    [
        ("cat", "a cat"),
        ("apple", "an apple"),
        ("orange cat", "an orange cat"),
        ("hourglass", "an hourglass"),
        ("honest face", "an honest face"),
        ("unicorn", "a unicorn"),
        ("ufo", "a ufo"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("unimpressed face", "an unimpressed face"),
        ("umbrella", "an umbrella"),
        ("house", "a house"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("octopus", "an octopus"),
        ("rice", "rice"),
        ("two hearts", "two hearts"),
        ("flag of france", "flag of france"),
        ("", ""),
    ],
)
def test_article(phrase, with_article):
    assert article(phrase) == with_article


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arrow-left-bold", "arrow left"),
        ("Red_Apple_01", "red apple"),
        ("tree-24px", "tree"),
        ("heart-filled-48", "heart"),
        ("coffeeCup", "coffee cup"),
        ("café", "cafe"),
        ("!!!", ""),
    ],
)
def test_clean(name, words):
    assert clean(name) == words


@pytest.mark.parametrize(
    "name", ["github", "brand-github", "Apple-Logo", "node-js", "my_facebook_page", "some-logo"]
)
def test_brands_are_known(name):
    assert is_brand(name)


@pytest.mark.parametrize("name", ["apple", "red apple", "window", "swiftlet", "amazonian parrot", "logos"])
def test_plain_words_are_no_brands(name):
    assert not is_brand(name)


def test_code_points_have_one_spelling():
    assert code_key("2764-FE0F") == code_key("❤️") == code_key("2764") == "2764"
    assert code_key("1F468-200D-1F33E") == "1f468-200d-1f33e"


# ---- captions ----


@pytest.mark.parametrize("background", [None, *COLORS])
def test_each_caption_names_the_background_or_none_does(background):
    words = Words("red heart", names=("love",), keywords=("valentine", "card", "like"))
    texts = cap.captions(words, "flat emoji", None, background, 0.0, False)
    assert len(texts) == len(set(texts)) >= 5
    assert texts[0].startswith("a flat emoji of a red heart")
    assert all(("background" in text) == bool(background) for text in texts)
    if background:
        wanted = f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
        assert all(text.endswith(wanted) for text in texts)


def test_ink_is_named_in_every_caption():
    texts = cap.captions(Words("anchor", names=("ship anchor",)), "map icon", "orange", None, 0.0, False)
    assert texts[0] == "an orange map icon of an anchor" and all("orange" in text for text in texts)


def test_skin_tone_and_flags():
    texts = cap.captions(Words("waving hand", tone="dark skin tone"), "round emoji", None, None, 0.0, False)
    assert "a round emoji of a waving hand, dark skin tone" in texts
    texts = cap.captions(
        Words("flag of france", keywords=("flag", "france")), "round flag", None, None, 0.0, False
    )
    assert texts[0] == "a round flag of france" and "flag of france" in texts


def test_held_out_is_a_function_of_the_phrase():
    assert cap.is_held_out("Red  Heart", 0.5) == cap.is_held_out("red heart", 0.5)
    words = [f"word {k}" for k in range(4000)]
    held = {w for w in words if cap.is_held_out(w, 0.1)}
    assert 0.08 < len(held) / len(words) < 0.12
    assert held <= {w for w in words if cap.is_held_out(w, 0.2)}
    other = next(iter(held))
    texts = cap.captions(Words("a thing", names=(other,), keywords=(other,)), "icon", None, None, 0.1, False)
    assert not any(other in text for text in texts)
    texts = cap.captions(Words("a thing", names=(other,), keywords=(other,)), "icon", None, None, 0.1, True)
    assert any(other in text for text in texts)


def test_shares_are_even_and_fixed():
    values = [share(f"key {k}") for k in range(1000)]
    assert min(values) >= 0 and max(values) < 1 and 0.45 < np.mean(values) < 0.55
    assert share("key") == share("key")


# ---- colours ----


def test_the_colour_table():
    assert all(nearest(rgb(word)) == word for word in COLORS)
    assert all(len(value) == 7 and value[0] == "#" for value in COLORS.values())
    assert nearest((250, 250, 252)) == "white" and nearest((0, 0, 0)) == "black"
    with pytest.raises(ValueError, match="red"):
        rgb("reddish")


def test_inks_and_backgrounds_can_be_seen():
    rng = np.random.default_rng(0)
    inks = [cap.pick_ink(f"icon {k}", rng) for k in range(300)]
    assert 0.25 < inks.count("black") / 300 < 0.42 and "white" not in inks
    for word in COLORS:
        for _ in range(20):
            chosen = cap.pick_background(rgb(word), rng)
            assert np.linalg.norm(np.subtract(rgb(chosen), rgb(word))) >= 90


# ---- pictures ----


def test_fit_crops_centres_and_hides_no_colour():
    wide = Image.new("RGBA", (300, 200), (9, 9, 9, 0))
    wide.paste((200, 10, 10, 255), (20, 30, 220, 130))
    picture = fit(wide, 64)
    pixels = np.array(picture)
    box = picture.getbbox()
    assert picture.size == (64, 64) and box[2] - box[0] == 59 and abs((box[1] + box[3]) / 2 - 32) <= 1
    assert not pixels[pixels[..., 3] == 0].any() and tuple(pixels[32, 32]) == (200, 10, 10, 255)
    assert fit(Image.new("RGBA", (64, 64)), 64) is None


def test_ink_and_background_are_exact():
    picture = draw_shape("star", "blue", 64)
    inky = np.array(inked(picture, "teal"))
    assert (inky[inky[..., 3] > 0][:, :3] == rgb("teal")).all()
    assert nearest(edge_color(picture)) == "blue"
    laid = np.array(on_color(picture, "mint"))
    assert (laid[..., 3] == 255).all() and tuple(laid[0, 0, :3]) == rgb("mint")


# ---- shapes ----


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_inside_in_its_colour(shape):
    pixels = np.array(draw_shape(shape, "purple", 64))
    assert 0.05 < (pixels[..., 3] > 0).mean() < 0.8
    assert (pixels[pixels[..., 3] > 0][:, :3] == rgb("purple")).all() and not pixels[
        pixels[..., 3] == 0
    ].any()
    assert not pixels[[0, -1], :, 3].any() and not pixels[:, [0, -1], 3].any()


def test_shape_samples_say_what_they_show():
    samples = list(shape_samples(400, 32, seed=0))
    again = list(shape_samples(400, 32, seed=0))
    assert all(
        a[1].tobytes() == b[1].tobytes() and a[2:] == b[2:] for a, b in zip(samples, again, strict=True)
    )
    splits: dict[str, set[str]] = {}
    for _, picture, caption, meta in samples:
        corner = picture.getpixel((0, 0))
        background, shape = meta["background"], meta["phrase"].split()[-1]
        assert caption == meta["captions"][0] and shape in SHAPES and meta["ink"] in caption
        assert corner == (*rgb(background), 255) if background else corner[3] == 0
        assert all(("background" in text) == bool(background) for text in meta["captions"])
        splits.setdefault(meta["phrase"], set()).add(meta["split"])
    assert {bool(meta["background"]) for *_, meta in samples} == {True, False}
    assert all(len(found) == 1 for found in splits.values())
    held = sum("heldout" in found for found in splits.values())
    assert 0.03 < held / len(splits) < 0.2


def test_shapes_are_written_whole(tmp_path):
    build_shapes(tmp_path / "a", count=30)
    build_shapes(tmp_path / "b", count=30)
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()
    assert len(ShardDataset(tmp_path / "a")) == 30
    with pytest.raises(ValueError, match="already holds"):
        build_shapes(tmp_path / "a", count=30)
    with pytest.raises(ValueError, match="multiple of 8"):
        build_shapes(tmp_path / "c", size=30)


# ---- a corpus, end to end ----

PACKAGES = {
    "iconify": {"manager": "npm", "name": "@iconify/json", "version": "1.0.0"},
    "emojibase": {"manager": "npm", "name": "emojibase-data", "version": "1.0.0"},
    "emojilib": {"manager": "npm", "name": "emojilib", "version": "1.0.0"},
}
SOURCES = {
    "faces": {"kind": "emoji", "style": "flat emoji"},
    "things": {"kind": "icon", "style": "line icon"},
    "stencils": {"kind": "icon", "palette": "mono", "style": "stencil icon"},
    "flags": {"kind": "flag", "style": "round flag"},
}
SQUARE = '<rect x="2" y="2" width="12" height="12" fill="{}"/>'
DISC = '<circle cx="8" cy="8" r="6" fill="{}"/>'


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def iconify_set(bodies: dict[str, str], licence: str = "MIT", **more) -> dict:
    info = {"name": "Toy Set", "author": {"name": "A. Painter"}, "license": {"spdx": licence}}
    return {
        "info": info,
        "width": 16,
        "height": 16,
        "icons": {name: {"body": body} for name, body in bodies.items()},
        **more,
    }


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus description whose packages lie unpacked in the cache; gives (its path, the iconify folder)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = {}
    for key, options in PACKAGES.items():
        slug = f"npm-{options['name']}-{options['version']}".replace("/", "_")
        folders[key] = default_cache() / slug
        folders[key].mkdir(parents=True)
    emoji = [
        {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"]},
        {"hexcode": "1F1EB-1F1F7", "label": "flag: France", "tags": ["FR"]},
        {
            "hexcode": "1F44B", "label": "waving hand", "tags": ["hello"],
            "skins": [{"hexcode": "1F44B-1F3FF", "label": "waving hand: dark skin tone"}],
        },
    ]  # fmt: skip
    write_json(folders["emojibase"] / "en/data.json", emoji)
    write_json(folders["emojibase"] / "en/shortcodes/github.json", {"2764-FE0F": "heart", "1F44B": ["wave"]})
    write_json(
        folders["emojilib"] / "dist/emoji-en-US.json",
        {"❤️": ["red_heart", "like"], "👋": ["waving_hand", "hi"]},
    )
    faces = {
        "red-heart": DISC.format("#f00"),
        "waving-hand": DISC.format("#fb0"),
        "waving-hand-dark": SQUARE.format("#420"),
    }
    chars = {"2764": "red-heart", "1f44b": "waving-hand", "1f44b-1f3ff": "waving-hand-dark"}
    things = {
        "blue-box-outline": SQUARE.format("#00f"),
        "green-ball": DISC.format("#0a0"),
        "another-green-ball": DISC.format("#0a0"),  # looks the same: left out
        "github": DISC.format("#111"),  # a brand
        "hello-mark": DISC.format("#999"),  # in a category of brands
        "nothing": "",
        "broken": "<rect x=",
        **{
            f"tile-{word}": SQUARE.format(f"#{7 * k % 10}{k}{9 - k}")
            for k, word in enumerate(("one", "two", "six", "ten"))
        },
    }
    sets = {
        "faces": iconify_set(faces, chars=chars),
        "things": iconify_set(things, "CC0-1.0", categories={"Brand Logos": ["hello-mark"]}),
        "stencils": iconify_set(
            {"anchor": DISC.format("currentColor").replace("6", "5") + '<path d="M0 0h9v1H0z"/>'}
        ),
        "flags": iconify_set(
            {"fr": DISC.format("#03f") + SQUARE.format("#eee"), "nowhere": SQUARE.format("#123")}
        ),
    }
    for name, data in sets.items():
        write_json(folders["iconify"] / "json" / f"{name}.json", data)
    config = {
        "size": 32,
        "held_out": 0.3,
        "backgrounds": 0.6,
        "skin_tones": 1.0,
        "packages": PACKAGES,
        "sources": SOURCES,
    }
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, folders["iconify"]


def test_a_small_corpus_end_to_end(corpus, tmp_path):
    path, _ = corpus
    seen: list[tuple[int, int]] = []
    report = build(path, tmp_path / "out", workers=1, progress=lambda done, total: seen.append((done, total)))
    dataset = ShardDataset(tmp_path / "out", on_error="raise")
    samples = list(dataset)
    metas = [s["meta"] for s in samples]
    assert report.samples == len(samples) > report.pictures == len({(m["source"], m["name"]) for m in metas})
    assert report.left_out["duplicate"] == 1 and report.left_out["nothing drawn"] == 2
    assert seen[-1][0] == seen[-1][1] == len(seen)
    phrases = {m["phrase"] for m in metas}
    assert {"red heart", "waving hand", "blue box", "anchor", "flag of france"} <= phrases
    assert not any(
        word in " ".join(phrases) for word in ("github", "hello mark", "nowhere", "nothing", "broken")
    )
    for sample, meta in zip(samples, metas, strict=True):
        picture, background = sample["picture"], meta["background"]
        assert picture.size == (32, 32) and sample["caption"] == meta["captions"][0]
        corner = picture.getpixel((0, 0))
        assert corner == ((*rgb(background), 255) if background else (0, 0, 0, 0))
        assert all(("background" in text) == bool(background) for text in meta["captions"])
        assert meta["split"] == ("heldout" if cap.is_held_out(meta["phrase"], 0.3) else "train")
        assert meta["licence"] in ("MIT", "CC0-1.0") and meta["attribution"] == "Toy Set by A. Painter"
        assert (meta["package"], meta["version"]) == ("@iconify/json", "1.0.0")
        if meta["palette"] == "mono":
            assert (
                all(meta["ink"] in text for text in meta["captions"])
                and meta["ink_hex"] == COLORS[meta["ink"]]
            )
    assert {m["split"] for m in metas} == {"train", "heldout"} and {bool(m["background"]) for m in metas} == {
        True,
        False,
    }
    tones = [m for m in metas if m["name"] == "waving-hand-dark"]
    assert tones and all("dark skin tone" in m["captions"][0] for m in tones)
    build(path, tmp_path / "again", workers=1)
    assert (tmp_path / "out/00000.tar").read_bytes() == (tmp_path / "again/00000.tar").read_bytes()


def test_a_few_larger_pictures_of_the_corpus(corpus, tmp_path):
    path, _ = corpus
    report = build(path, tmp_path / "whole", workers=1)
    few = build(path, tmp_path / "few", workers=1, size=64, limit=3, vectors_only=True)
    assert 0 < few.pictures <= 3 < report.pictures
    larger = {s["meta"]["name"]: s["picture"].size for s in ShardDataset(tmp_path / "few")}
    known = {s["meta"]["name"]: s["meta"]["split"] for s in ShardDataset(tmp_path / "whole")}
    assert set(larger.values()) == {(64, 64)} and set(larger) < set(known)


def test_a_licence_that_is_not_permissive_stops_the_build(corpus, tmp_path):
    path, iconify = corpus
    write_json(iconify / "json/things.json", iconify_set({"box": SQUARE.format("#00f")}, "CC-BY-NC-4.0"))
    with pytest.raises(ValueError, match="CC-BY-NC-4.0"):
        build(path, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_package_of_an_unknown_manager_is_refused(tmp_path):
    with pytest.raises(ValueError, match="npm or apt"):
        fetch(Package("pip", "thing", "1"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_is_never_drawn_for_it_depends_on_fonts():
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="40{unit}" height="40{unit}"><circle cx="9" cy="9" r="8"/>'
    words = '<text x="2" y="30" font-size="20">say <tspan>ha</tspan>!</text><text/><g><textPath>on</textPath></g></svg>'
    for unit in ("", "pt"):  # resvg refuses the second, which cairosvg draws
        bare, told = (_svg(head.format(unit=unit) + rest, 64) for rest in ("</svg>", words))
        assert bare and told and bare.getbbox() and bare.tobytes() == told.tobytes()
