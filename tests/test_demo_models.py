"""Models and adapters in the tabs that draw: what a page chooses, what follows, what a reload brings back."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr
from conftest import build_tiny_pipeline
from PIL import Image, ImageDraw
from serving import near, write_lora

from demo import controls, create, finetune, finetune_controls, grid, models, vary
from demo.adapters import choices, chosen, pickers
from demo.editor import CANVAS
from demo.lane import Lane
from demo.models import model_picker
from demo.person import person
from demo.request import asked_for
from demo.runs import Runs, new_person
from diffusionfm.images import read_parameters
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


def shown(stage: str) -> list[tuple[Image.Image, dict]]:
    """The pictures of a stage and what their files tell."""
    files = [
        base64.b64decode(found)
        for found in re.findall(r'<img[^>]* src="data:image/png;base64,([^"]+)', stage)
    ]
    return [
        (Image.open(io.BytesIO(data)).convert("RGBA"), read_parameters(io.BytesIO(data))) for data in files
    ]


def last(drawing):
    *_, update = drawing
    return update


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
    asked = (PICTURE, canvas, "a red apple", "", 0.0, 5, False, 1, 4, 3.0, PAGE)
    drawn = {}
    for choice, weight in (("none", 1.0), (rings.key, 0.5)):
        ((found, told),) = shown(last(tabs.vary.draw(ME, "tiny", choice, weight, *asked))[tabs.vary.at.stage])
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
        if choice != "none":
            pipe.load_lora(rings.out, weight)
        same = pipe("a red apple", seed=5, num_inference_steps=4, image=PICTURE, mask_image=mask).images[0]
        assert near(found, same) and told.get("lora") == (None if choice == "none" else ["rings:0.5"])
        assert not painted or found.crop((0, 0, 32, 6)).tobytes() == PICTURE.crop((0, 0, 32, 6)).tobytes()
        drawn[choice] = found
    assert not near(*drawn.values())


def test_a_grid_weighs_an_adapter(studio, rings):
    lane, tabs = studio
    asked = ("a red apple", "lora", "0, 1", "none", "", 3, 2, 3.0, "", None, PAGE)
    stage = last(tabs.grid.draw(ME, "tiny", rings.key, 1.0, *asked))[tabs.grid.at.stage]
    ((sheet, _),) = shown(stage)
    assert "2 pictures, lora across" in stage and sheet.width > 320
    with pytest.raises(gr.Error, match="no LoRA is in use"):
        list(tabs.grid.draw(ME, "tiny", "none", 1.0, *asked))


def test_a_grid_tells_what_the_prompt_loses_once(studio):
    _, tabs = studio
    prompt = "a red apple " * 20 + "and a walrus"
    update = last(
        tabs.grid.draw(ME, "tiny", "none", 1.0, prompt, "seed", "0-1", "none", "", 3, 2, 3.0, "", None, PAGE)
    )
    assert update[tabs.grid.at.status].count("walrus") == update[tabs.grid.at.said].count("walrus") == 1


def test_an_adapter_of_another_model_is_refused_with_the_fix(studio, rings):
    lane, tabs = studio
    wide = lane.models.engine("wide").pipe
    assert (f"rings ({lane.pipe.model_name})", rings.key) in choices(lane, ME)
    with pytest.raises(ValueError, match="'rings' is for the model 'tiny': choose that model"):
        chosen(lane, ME, rings.key, 1.0, wide)
    for tab, asked in (
        (tabs.vary, (PICTURE, None, "x", "", 0.5, 5, False, 1, 2, 3.0, PAGE)),
        (tabs.grid, ("a red apple", "seed", "0", "none", "", 3, 2, 3.0, "", None, PAGE)),
    ):
        with pytest.raises(gr.Error, match="is for the model 'tiny'"):
            list(tab.draw(ME, "wide", rings.key, 1.0, *asked))
    assert lane.models.waiting == 0


# ------------------------------------------------------------------ models


def test_what_is_drawn_is_the_chosen_model_s(studio):
    lane, tabs = studio
    asked = ("a red apple", "", 7, 2, 3.0, 1, "")
    for model, size in (("tiny", 32), ("wide", 64)):
        drawing = lane.start(TICKET, asked_for(*asked), "page", model)
        update = last(tabs.create.draw(TICKET, PAGE))
        ((found, told),) = shown(update[tabs.create.at.stage])
        pipe = lane.models.engine(model).pipe
        expected = pipe("a red apple", seed=7, num_inference_steps=2, guidance_scale=3.0).images[0]
        assert near(found, expected) and found.size == (size, size)
        assert told["model"] == drawing.model == model
    varied = last(
        tabs.vary.draw(ME, "wide", "none", 1.0, PICTURE, None, "x", "", 0.5, 5, False, 1, 2, 3.0, PAGE)
    )
    assert shown(varied[tabs.vary.at.stage])[0][0].size == (64, 64)  # fitted to the model, whichever it is
    with pytest.raises(gr.Error, match="no such model"):
        tabs.create.begin(
            "x", controls.AS_WRITTEN, controls.NOTHING, "", 1, False, 2, 3.0, "", 1, ME, "../wide", "none", 1.0, TICKET,
            PAGE,
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
