"""Models and adapters in the tabs that draw: what a page chooses, what follows, what a reload brings back."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr
import numpy as np
from conftest import build_tiny_pipeline
from PIL import Image, ImageDraw
from serving import near, until, write_lora

from demo import batch, controls, create, finetune, finetune_controls, grid, models, restore, vary
from demo.adapters import choices, chosen, pickers
from demo.drawtab import Chosen
from demo.editor import CANVAS
from demo.lane import Failed, Lane, outcome
from demo.models import model_picker
from demo.person import person
from demo.request import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, asked_for
from demo.runs import Runs, new_person
from diffusionfm.images import encode_png, format_a1111, parse_a1111, read_parameters
from diffusionfm.lora import BASE_HASH, BASE_NAME
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.models import Models, find_models

ME, TICKET = new_person(), "0" * 32
PAGE = SimpleNamespace(session_hash="page", state=SimpleNamespace(caller="127.0.0.1"))
PICTURE = Image.new("RGBA", (32, 32), "orange")


@pytest.fixture(scope="module")
def studio(tiny_model, tmp_path_factory):
    """A lane of two models, and its tabs; the second draws larger pictures, in other steps and guidance."""
    place = tmp_path_factory.mktemp("studio")
    wide = build_tiny_pipeline(1)
    wide.defaults |= {"steps": 5, "guidance": 2.0, "width": 64, "height": 64}
    wide.save_pretrained(place / "models/wide")
    first = Engine(DiffusionFMPipeline.from_pretrained(tiny_model))
    with Models(first, find_models(place / "models")[0]) as several:
        lane = Lane(several, Runs(place / "runs"))
        with gr.Blocks():
            lane.person, lane.model, lane.pickers = person(gr.Blocks()), model_picker(lane), pickers(lane)
            tabs = SimpleNamespace(
                create=create.Tab(lane, controls.lay_out(lane)),
                vary=vary.Tab(lane, vary.lay_out(lane)),
                grid=grid.Tab(lane, grid.lay_out(lane)),
                finetune=finetune.Tab(lane, finetune_controls.lay_out()),
            )
        yield lane, tabs


@pytest.fixture(scope="module")
def rings(studio):
    """A training of mine on the first model, its adapter written by hand."""
    lane, _ = studio
    run = lane.runs.new(ME, "finetune", "rings")
    write_lora(lane.pipe.config["_name_or_path"], run.out, seed=3)
    file = run.out / "adapter_config.json"
    told = {BASE_NAME: lane.pipe.model_name, BASE_HASH: lane.pipe.base_hash}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    run.keep(model=lane.pipe.model_name)
    return run


def files_of(stage: str) -> list[bytes]:
    """The PNG files that a stage offers to download."""
    return [
        base64.b64decode(it) for it in re.findall(r'<a href="data:image/png;base64,([^"]+)" download', stage)
    ]


def shown(stage: str) -> list[tuple[Image.Image, dict]]:
    """The pictures of a stage and what their files tell."""
    return [
        (Image.open(io.BytesIO(data)).convert("RGBA"), read_parameters(io.BytesIO(data)))
        for data in files_of(stage)
    ]


def last(drawing):
    *_, update = drawing
    return update


def drawn(tab, model: str, choice: str, weight: float, *form, ticket: str = TICKET):
    """The last thing that the page is told of a drawing."""
    tab.begin(ticket, ME, model, choice, weight, PAGE, *form)
    return last(tab.watch(ticket, PAGE))


def value(update: dict, part: object) -> object:
    found = update[part]
    return found.constructor_args["value"] if hasattr(found, "constructor_args") else found


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("painted", [False, True])
def test_a_picture_is_varied_with_an_adapter(studio, rings, tiny_model, painted):
    lane, tabs = studio
    layer = Image.new("RGBA", (CANVAS, CANVAS))
    ImageDraw.Draw(layer).rectangle((128, 128, 255, 255), fill="red")
    canvas = {"layers": [layer] if painted else []}
    mask = layer.getchannel("A").resize((32, 32), Image.Resampling.BOX) if painted else None
    asked = (PICTURE, canvas, "a red apple", "", "auto", 0.0, 5, False, 1, 4, 3.0)
    seen = {}
    for choice, weight in (("none", 1.0), (rings.key, 0.5)):
        ((found, told),) = shown(drawn(tabs.vary, "tiny", choice, weight, *asked)[tabs.vary.at.stage])
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
        if choice != "none":
            pipe.load_lora(rings.out, weight)
        same = pipe("a red apple", seed=5, num_inference_steps=4, image=PICTURE, mask_image=mask).images[0]
        assert near(found, same) and told.get("lora") == (None if choice == "none" else ["rings:0.5"])
        assert not painted or found.crop((0, 0, 32, 6)).tobytes() == PICTURE.crop((0, 0, 32, 6)).tobytes()
        seen[choice] = found
    assert not near(*seen.values())


GRIDDED = (3, 2, 3.0, "", None)
"""Seed, steps, guidance, nothing to leave out and no picture, as the Grid tab has them."""


def requests(tab, form: tuple, model: str = "tiny", choice: str = "none") -> list[tuple]:
    """What the Grid tab asks for: (model, what is worn, request)."""
    asked = tab.plan(Chosen(ME, model, choice, 0.5), *form)
    return [(m, [(n.partition("+")[0], w) for n, w in r.loras], r) for m, r in asked]


def test_a_grid_weighs_an_adapter(studio, rings):
    lane, tabs = studio
    asked = ("a red apple", "weight", "0, 1", "none", "", *GRIDDED)
    stage = drawn(tabs.grid, "tiny", rings.key, 1.0, *asked)[tabs.grid.at.stage]
    ((sheet, told),) = shown(stage)
    assert "2 pictures, weight across" in stage and sheet.width > 320
    assert (told["prompt"], told["seed"], told["model"]) == ("a red apple", 3, "tiny") and "lora" not in told
    with pytest.raises(gr.Error, match="no adapter is in use"):
        drawn(tabs.grid, "tiny", "none", 1.0, *asked)
    weighed = requests(tabs.grid, asked, choice=rings.key)
    assert [worn for _, worn, _ in weighed] == [[("rings", 0.0)], [("rings", 1.0)]]


def test_a_grid_of_models_adapters_and_sizes(studio, rings):
    lane, tabs = studio
    tab = tabs.grid
    assert [tab.fill(axis, ME, "tiny") for axis in ("size", "model", "adapter", "steps")] == [
        "32 × 32", "tiny, wide", "none, rings", "4, 8, 20",
    ]  # fmt: skip
    assert tab.fill("size", ME, "wide") == "64 × 64, 80 × 48, 48 × 80"
    form = ("a red apple", "model", "tiny, wide", "size", "32x32, 48 × 32", *GRIDDED)
    asked = requests(tab, form)
    assert [(model, r.width, r.height) for model, _, r in asked] == [
        ("tiny", 32, 32), ("wide", 32, 32), ("tiny", 48, 32), ("wide", 48, 32),
    ]  # fmt: skip
    update = drawn(tab, "tiny", "none", 1.0, *form)
    ((sheet, told),) = shown(update[tab.at.stage])
    assert "model" not in told and "width" not in told and told["height"] == 32 and sheet.height > 400
    worn = requests(tab, ("a red apple", "adapter", "none, rings", "weight", "0.2, 1", *GRIDDED))
    assert [loras for _, loras, _ in worn] == [[], [("rings", 0.2)], [], [("rings", 1.0)]]
    for x, xs, model, words in (
        ("model", "tiny, ../wide", "tiny", "no such model: choose tiny, wide"),
        ("model", "a, b, c", "tiny", "2 models at most are open beside tiny"),
        ("adapter", "none, squares", "tiny", "no adapter 'squares' for tiny: there are none, rings"),
        ("adapter", "rings", "wide", "no adapter 'rings' for wide"),
        ("size", "wide", "tiny", "no list of sizes"),
        ("strength", "0.5", "tiny", "strength needs a picture"),
    ):
        with pytest.raises(gr.Error, match=words):
            drawn(tab, model, "none", 1.0, "a red apple", x, xs, "none", "", *GRIDDED)
    left_out = requests(tab, ("a red apple", "leave out", "nothing, a leaf", "none", "", *GRIDDED))
    assert [r.negative_prompt for *_, r in left_out] == ["", "a leaf"]


def test_a_reload_fills_every_tab_that_draws_as_it_was(studio, rings, tmp_path):
    lane, tabs = studio
    file = tmp_path / "given.png"
    file.write_bytes(encode_png(PICTURE))
    noise = Image.new("RGBA", (CANVAS, CANVAS), "blue")
    canvas = {"background": noise, "layers": [noise], "composite": noise}
    forms = {
        tabs.create: ("a cat", "sticker", "teal", "a dog", 7, True, 2, 2.5, "32 × 32", 2),
        tabs.vary: (PICTURE, canvas, "a cat", "a dog", "strong", 0.8, 5, True, 1, 2, 3.0),
        tabs.grid: ("a cat", "seed", "4-5", "none", "", 3, 2, 3.5, "a dog", str(file)),
    }
    for k, (tab, form) in enumerate(forms.items()):
        ticket = f"{k:032x}"
        tab.begin(ticket, ME, "tiny", rings.key, 1.0, PAGE, *form)
        another = SimpleNamespace(session_hash="another", state=PAGE.state)
        again = tab.rejoin(ticket, "tiny", another)
        for part, told in zip(tab.form, form, strict=True):
            if part is tab.at.seed and tab is not tabs.grid:  # it was rolled, and is told
                assert again[part] == lane.find(f"{ticket} {tab.name}", "another").requests[0].seed != told
            else:
                assert value(again, part) == told
        seen = last(tab.watch(ticket, PAGE))
        assert shown(seen[tab.at.stage])[0][1]["prompt"].endswith(
            "a cat on a teal background" if k == 0 else "a cat"
        )
        stranger = tab.rejoin("f" * 32, "tiny", PAGE)
        assert tab.at.prompt not in stranger and tab.at.stage not in stranger

    file.unlink()
    assert tabs.grid.rejoin(f"{2:032x}", "tiny", PAGE)[tabs.grid.at.picture] is None
    assert tabs.create.at.size not in tabs.create.rejoin(f"{0:032x}", "wide", PAGE)  # which has no such size


def test_a_drawing_is_never_lost_from_sight(studio, monkeypatch):
    """One at a time; stopped or failed before its page looks on, it is told; a second window says so in the first."""
    lane, tabs = studio
    tab, form = tabs.vary, (PICTURE, None, "x", "", "auto", 0.9, 5, False, 1, 100, 3.0)
    tab.begin(TICKET, ME, "tiny", "none", 1.0, PAGE, *form)
    with pytest.raises(gr.Error, match="still under way: cancel it first"):
        tab.begin(TICKET, ME, "tiny", "none", 1.0, PAGE, *form)
    first = tab.watch(TICKET, PAGE)
    next(first)
    second = tab.watch(TICKET, PAGE)
    next(second)
    assert "another window" in last(first)[tab.at.status]
    tab.cancel(TICKET, PAGE)
    assert "Cancelled" in last(second)[tab.at.status] and not lane.models.waiting
    tab.begin(TICKET, ME, "tiny", "none", 1.0, PAGE, *form)
    tab.cancel(TICKET, PAGE)
    assert "Cancelled" in last(tab.watch(TICKET, PAGE))[tab.at.status]
    assert tab.at.stage not in tab.rejoin(TICKET, "tiny", PAGE)
    assert [tab.at.stage in update for update in tab.watch(TICKET, PAGE)] == [False]  # it was told already

    def broken(batch):
        raise RuntimeError("broken")

    monkeypatch.setattr(lane.models.first, "_advance", broken)
    tabs.grid.begin(TICKET, ME, "tiny", "none", 1.0, PAGE, "a red apple", "seed", "0-3", "none", "", *GRIDDED)
    until(lambda: not lane.models.waiting)
    with pytest.raises(gr.Error, match="could not be drawn"):
        list(tabs.grid.watch(TICKET, PAGE))


def test_a_grid_tells_what_the_prompt_loses_once(studio):
    _, tabs = studio
    prompt = "a red apple " * 20 + "and a walrus"
    update = drawn(tabs.grid, "tiny", "none", 1.0, prompt, "seed", "0-1", "none", "", *GRIDDED)
    assert update[tabs.grid.at.advice].count("walrus") == update[tabs.grid.at.said].count("walrus") == 1


def test_an_adapter_of_another_model_is_refused_with_the_fix(studio, rings):
    lane, tabs = studio
    wide = lane.models.engine("wide").pipe
    assert (f"rings ({lane.pipe.model_name})", rings.key) in choices(lane, ME)
    with pytest.raises(ValueError, match="'rings' is for the model 'tiny': choose that model"):
        chosen(lane, ME, rings.key, 1.0, wide)
    for tab, asked in (
        (tabs.vary, (PICTURE, None, "x", "", "auto", 0.5, 5, False, 1, 2, 3.0)),
        (tabs.grid, ("a red apple", "seed", "0", "none", "", *GRIDDED)),
    ):
        with pytest.raises(gr.Error, match="is for the model 'tiny'"):
            drawn(tab, "wide", rings.key, 1.0, *asked)
    assert lane.models.waiting == 0


def test_what_is_not_painted_stays_whichever_model_is_chosen(studio):
    """A picture as large as the chosen model draws, larger than the first one does."""
    lane, tabs = studio
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    given = Image.fromarray(noise, "RGBA")
    for chosen_then in ("tiny", "wide"):  # and chosen after it was given
        picture = tabs.vary.give(encode_png(given), chosen_then)[tabs.vary.at.picture]
        layer = Image.new("RGBA", (CANVAS, CANVAS))
        ImageDraw.Draw(layer).rectangle((0, 0, 127, 127), fill="red")
        asked = (picture, {"layers": [layer]}, "x", "", "auto", 0.0, 5, False, 1, 2, 3.0)
        ((found, _),) = shown(drawn(tabs.vary, "wide", "none", 1.0, *asked)[tabs.vary.at.stage])
        assert found.crop((0, 20, 64, 64)).tobytes() == given.crop((0, 20, 64, 64)).tobytes()
        assert found.tobytes() != given.tobytes()


def test_a_given_picture_has_the_model_s_shape_and_no_more_pixels_than_a_page_keeps():
    assert vary.shaped(Image.new("RGBA", (40, 20), "red"), 32, 32).getbbox() == (0, 10, 40, 30)
    assert vary.shaped(Image.new("RGBA", (9, 3)), 160, 96).size == (9, 5)
    assert vary.shaped(Image.new("RGBA", (5000, 3000)), 32, 32).size == (vary.MOST_SIDE,) * 2


def drawings(tabs) -> list:
    """(tab, its drawing) of each that draws, with the first model."""
    forms = {
        tabs.create: ("a red apple", controls.AS_WRITTEN, controls.NOTHING, "", 7, False, 2, 3.0, "", 1),
        tabs.vary: (PICTURE, None, "a red apple", "", "auto", 0.5, 5, False, 1, 2, 3.0),
        tabs.grid: ("a red apple", "seed", "0", "none", "", *GRIDDED),
    }
    for tab, form in forms.items():
        tab.begin(TICKET, ME, "tiny", "none", 1.0, PAGE, *form)
    return [(tab, tab.watch(TICKET, PAGE)) for tab in forms]


def test_a_drawing_that_breaks_off_is_told_without_internals(studio, monkeypatch):
    lane, tabs = studio

    def broken(batch):
        raise RuntimeError("CUDA error: /root/secret")

    monkeypatch.setattr(lane.models.first, "_advance", broken)
    for _, drawing in drawings(tabs):
        with pytest.raises(
            gr.Error, match="could not be drawn: try a smaller size or fewer pictures"
        ) as caught:
            list(drawing)
        assert "secret" not in str(caught.value)
    with pytest.raises(Failed):  # of the endpoint for programs
        outcome(lane.models.first.submit(asked_for("a red apple", "", 1, 2, 3.0, 1), "page"))


def test_every_file_that_is_handed_out_says_what_it_is(studio):
    _, tabs = studio
    kinds = ("/trainedAlgorithmicMedia", "/compositeWithTrainedAlgorithmicMedia", "/trainedAlgorithmicMedia")
    for (tab, drawing), kind in zip(drawings(tabs), kinds, strict=True):
        (file,) = files_of(last(drawing)[tab.at.stage])
        with Image.open(io.BytesIO(file)) as picture:
            assert kind in picture.info["XML:com.adobe.xmp"]
            assert picture.info["parameters"].startswith("a red apple\nSteps: 2")


def test_no_metadata_leaves_nothing_in_what_is_handed_out(studio, monkeypatch):
    lane, tabs = studio
    monkeypatch.setattr(lane, "metadata", False)
    for tab, drawing in drawings(tabs):
        (file,) = files_of(last(drawing)[tab.at.stage])
        with Image.open(io.BytesIO(file)) as picture:
            assert not picture.info
    for verb in ("svg 0", "zip"):
        parcel = tabs.create.act(TICKET, SimpleNamespace(value=verb), PAGE)[tabs.create.at.parcel]
        data = base64.b64decode(parcel[1].partition(",")[2])
        if verb == "zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = b"".join(map(archive.read, archive.namelist()))
        assert not [word for word in (b"apple", b"metadata", b"DiffusionFM", b"xmp") if word in data]
    settings = {
        "repeats": 1,
        "seed": 0,
        "format": "png",
        "to": "folder",
        "adapter": "none",
        "weight": 1,
        "model": None,
    }
    run = lane.runs.new(ME, "batch", "x")
    assert "--no-metadata" in batch.Tab._command(
        SimpleNamespace(lane=lane), ME, run, run.folder / "rows.txt", settings
    )
    lane.runs.delete(run)


# ------------------------------------------------------------------ models


def test_what_is_drawn_is_the_chosen_model_s(studio):
    lane, tabs = studio
    asked = ("a red apple", "", 7, 2, 3.0, 1, "")
    for model, size in (("tiny", 32), ("wide", 64)):
        drawing = lane.start(f"{TICKET} create", [(model, asked_for(*asked))], "page")
        update = last(tabs.create.watch(TICKET, PAGE))
        ((found, told),) = shown(update[tabs.create.at.stage])
        pipe = lane.models.engine(model).pipe
        expected = pipe("a red apple", seed=7, num_inference_steps=2, guidance_scale=3.0).images[0]
        assert near(found, expected) and found.size == (size, size)
        assert told["model"] == drawing.models[0] == model
    varied = drawn(tabs.vary, "wide", "none", 1.0, PICTURE, None, "x", "", "auto", 0.5, 5, False, 1, 2, 3.0)
    assert shown(varied[tabs.vary.at.stage])[0][0].size == (64, 64)  # fitted to the model, whichever it is
    with pytest.raises(gr.Error, match="no such model"):
        tabs.create.begin(
            TICKET, ME, "../wide", "none", 1.0, PAGE,
            "x", controls.AS_WRITTEN, controls.NOTHING, "", 1, False, 2, 3.0, "", 1,
        )  # fmt: skip


def test_steps_guidance_and_size_follow_the_model_and_what_does_not_fit_comes_off(studio, rings):
    lane, tabs = studio
    new = models.choose(lane, ME, "wide", rings.key, "none", rings.key, "none")
    for at in (tabs.create.at, tabs.vary.at, tabs.grid.at):
        assert (new[at.steps], new[at.guidance]) == (5, 2.0)
    assert value(new, tabs.create.at.size) == "64 × 64" and "64 × 64 px" in new[lane.model.head]
    assert [new[picker.choice] for picker in lane.pickers.values()] == ["none"] * 4
    back = models.choose(lane, ME, "tiny", rings.key, "none", "none", "none")
    assert back[lane.pickers["create"].choice] == rings.key and back[tabs.vary.at.steps] == 3
    with pytest.raises(gr.Error, match="no such model"):
        models.choose(lane, ME, "/etc", *["none"] * 4)


def test_a_reload_brings_back_the_model_the_adapters_and_their_weights(studio, rings):
    lane, tabs = studio
    create_, vary_ = lane.pickers["create"], lane.pickers["vary"]
    new = models.reopen(lane, ME, ["tiny", rings.key, 0.4, "none", 1, "none", 9])
    assert value(new, create_.choice) == rings.key and new[create_.weight] == 0.4
    assert new[lane.pickers["grid"].weight] == 2.0 and lane.model.choice not in new
    new = models.reopen(lane, ME, ["wide", rings.key, 0.4, "none", 1, "none", 1])
    assert new[lane.model.choice] == "wide" and new[tabs.create.at.steps] == 5
    assert "value" not in new[create_.choice].constructor_args  # it is for another model
    stranger = models.reopen(lane, new_person(), ["tiny", rings.key, 0.4, "none", 1, "none", 1])
    assert stranger[create_.choice].constructor_args == {"choices": [("none", "none")]}
    for forged in (None, {}, 7, [], ["tiny"], ["../etc", [rings.key], "x", {}, None, 3, 3], [[]] * 7):
        new = models.reopen(lane, ME, forged)
        assert lane.model.choice not in new and create_.weight not in new and vary_.weight not in new


def test_drawing_with_what_was_learned_chooses_its_model(studio, rings):
    lane, tabs = studio
    new = tabs.finetune.use(ME, rings.key, "wide")
    assert new[lane.model.choice] == "tiny" and new[tabs.create.at.steps] == 3
    assert {value(new, picker.choice) for picker in lane.pickers.values()} == {rings.key}
    assert lane.model.choice not in tabs.finetune.use(ME, rings.key, "tiny")
    draft = lane.runs.new(ME, "finetune", "more")
    settings = {
        "preset": "laptop",
        "method": "lora",
        "steps": 4,
        "missing": "name",
        "trigger": "",
        "prior": False,
    }
    train, export = tabs.finetune._commands(draft, settings, lane.models.engine("wide").pipe)
    assert Path(train[train.index("--model") + 1]).name == Path(export[-1]).name == "wide"


# ------------------------------------------------------------------ settings come back


@pytest.fixture(scope="module")
def recall(studio):
    """Settings that were told, back into Create: the update by the ids of its components, and by component."""
    lane, tabs = studio
    at = {name: getattr(tabs.create.at, name) for name in restore.CREATE[:-1]} | {
        "announcer": tabs.create.at.said
    }

    def recalled(told, person=ME, model="tiny"):
        new = restore.recall(lane, at, person, model, ["none"] * 4, told)
        return new | {name: new[part] for name, part in at.items() if part in new}

    return recalled


@pytest.mark.parametrize("told_by", [dict, lambda told: parse_a1111(format_a1111(told))])
def test_what_was_drawn_is_drawn_again_from_what_it_tells(studio, rings, recall, told_by):
    lane, tabs = studio
    create_, ticket = lane.pickers["create"], "1" * 32
    for model, choice, size in (("tiny", rings.key, "32 × 32"), ("wide", "none", "80 × 48")):
        asked = ("a red apple", controls.AS_WRITTEN, controls.NOTHING, "a fish", 7, False, 3, 2.5, size, 1)
        update = drawn(tabs.create, model, choice, 0.5, *asked, ticket=ticket)
        ((first, told),) = shown(update[tabs.create.at.stage])
        new = recall(told_by(told), model="wide" if model == "tiny" else "tiny")
        assert new["advice"] == "" and new[lane.model.choice] == model
        again = (new["prompt"], new["style"], new["background"], new["negative"], new["seed"], new["fresh"])
        again += (new["steps"], new["guidance"], value(new, tabs.create.at.size), 1)
        worn = value(new, create_.choice), new[create_.weight]
        update = drawn(tabs.create, new[lane.model.choice], *worn, *again, ticket=ticket)
        ((second, _),) = shown(update[tabs.create.at.stage])
        assert first.tobytes() == second.tobytes() and f"{first.width} × {first.height}" == size


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"model": "photo"}, "The model 'photo' that drew it is not here"),
        (
            {"model": "tiny", "model_hash": "0" * 12},
            "Tiny had other weights, or another precision, when it was drawn: the picture may differ",
        ),
        ({"lora": ["squares:0.5"]}, "The adapter squares:0.5 that drew it cannot be had"),
        ({"lora": "rings:9"}, "The adapter rings:9 that drew it cannot be had"),
        ({"lora": ["rings:1", "squares:1"]}, "the adapters rings:1, squares:1, and Create takes one"),
        ({"lora": ["rings:1"], "model": "wide"}, "The adapter rings:1 that drew it cannot be had"),
        ({"width": 512, "height": 512}, "512 × 512 pixels is not a size of tiny: 32 × 32 will be drawn"),
        ({"steps": 400}, "Steps 400 is out of range here: 100 will be drawn"),
        ({"seed": MAX_SEED + 1}, "Seed 9007199254740992 is out of range"),
        ({"strength": 0.5}, "drawn from another picture"),
    ],
)
def test_what_cannot_be_drawn_again_is_said(studio, rings, recall, told, words):
    lane, tabs = studio
    new = recall({"prompt": "a red apple"} | told)
    assert words in new["advice"].replace("&#x27;", "'") and words[1:] in new["announcer"]
    assert value(new, lane.pickers["create"].choice) == "none"


def test_an_adapter_comes_back_to_its_owner_alone(studio, rings, recall):
    lane, _ = studio
    told, choice = {"prompt": "a red apple", "lora": ["rings:0.5"]}, lane.pickers["create"].choice
    assert value(recall(told), choice) == rings.key
    stranger = recall(told, new_person())
    assert value(stranger, choice) == "none" and "cannot be had here" in stranger["advice"]


def test_values_are_brought_into_the_range_of_the_controls(studio, recall):
    wild = {"prompt": "x" * 9000, "seed": -5, "steps": 10**9, "guidance": 1e9, "negative_prompt": "y" * 9000}
    new = recall(wild)
    assert len(new["prompt"]) == len(new["negative"]) == MAX_PROMPT
    assert (new["seed"], new["fresh"], new["steps"], new["guidance"]) == (0, False, MAX_STEPS, MAX_GUIDANCE)
    for told in ({"prompt": "x", "guidance": float("nan")}, parse_a1111("x\nSteps: 9, CFG scale: nan")):
        assert "guidance" not in recall(told)
    assert not {"seed", "fresh", "steps", "guidance", "size"} & set(recall({"prompt": "a"}))


def test_restore_and_history_fill_create_and_keep_what_they_chose(pipe, tmp_path):
    """The page's own events: what is wired to what."""
    from demo import app

    with Models(Engine(pipe)) as offered:
        blocks = app.build(offered, Runs(tmp_path))
        ids = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
        for name, event in (("restore-send", "sent"), ("history", "pasted")):
            (call,) = [
                fn
                for fn in blocks.fns.values()
                if (ids[name]._id, "click") in fn.targets and fn.name == event
            ]
            filled = {
                ids[name] for name in (*restore.CREATE, "model", "adapter", "adapter-weight", "vary-adapter")
            }
            assert filled <= set(call.outputs)
