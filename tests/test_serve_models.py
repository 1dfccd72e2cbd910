"""Several models behind one server: which a folder offers, which are open, which one a request names."""

from __future__ import annotations

import gc
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event

import pytest
from conftest import build_tiny_pipeline
from serving import APPLE, Running, picture, until

from diffusionfm.cli import main
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve import models
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, QueueFull, Request
from diffusionfm.serve.models import Models, find_models


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder of three tiny models, drawing differently: red, green and blue."""
    folder = tmp_path_factory.mktemp("registry")
    for seed, name in enumerate(("red", "green", "blue"), 1):
        build_tiny_pipeline(seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def several(tiny_pipe, shelf, monkeypatch):
    monkeypatch.setattr(models, "GRACE", -1.0)
    with Models(Engine(tiny_pipe), find_models(shelf)[0]) as several:
        yield several


def draw(engine: Engine, **more):
    return engine.submit(Request("a red apple", seed=1, steps=1, **more))


# ------------------------------------------------------------------ what a folder offers


def test_pipelines_are_found_by_name_and_nothing_else_is(shelf, tmp_path, tiny_model):
    folder = tmp_path / "models"
    shutil.copytree(shelf / "red", folder / "red")
    shutil.copytree(shelf / "red", folder / ".hidden")
    shutil.copytree(shelf / "red", folder / "cut")
    (folder / "cut/vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    shutil.copytree(shelf / "red", folder / tiny_model.name)
    (folder / "notes").mkdir()
    (folder / "a.txt").write_text("x")
    (folder / "outside").symlink_to(shelf / "blue")
    (folder / "loop").symlink_to(folder / "loop")
    found, left_out = find_models(folder, tiny_model)
    assert found == {"red": folder / "red"}
    assert len(left_out) == 2 and "'cut' is left out" in left_out[0] and "cut short" in left_out[0]
    assert f"'{tiny_model.name}' is left out" in left_out[1] and "rename" in left_out[1]
    found, _ = find_models(folder, folder / "red")
    assert list(found) == [tiny_model.name]  # the one that is open is not named twice
    found, left_out = find_models(folder, tiny_model, fast=True)
    assert not found and any("'red' is left out: it has no few_step adapter" in word for word in left_out)


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for command in ("demo", "serve"):
        for folder, words in (("nowhere", "no folder of models"), ("empty", "no sub-folder")):
            assert main([command, "--models", str(tmp_path / folder), "--port", "0"]) == 2
            told = capsys.readouterr().err
            assert words in told and told.count("\n") == 1


# ------------------------------------------------------------------ which are open


def test_a_model_is_opened_when_it_is_asked_for_and_draws_as_itself(several, tiny_pipe, shelf):
    assert several.names == ["tiny", "blue", "green", "red"] and len(several.engines) == 1
    assert several.engine() is several.engine("tiny") is several.first
    found = {
        name: draw(several.engine(name)).result(60).images[0].tobytes() for name in ("tiny", "red", "green")
    }
    assert len(set(found.values())) == 3
    again = type(tiny_pipe).from_pretrained(shelf / "red")
    assert found["red"] == again("a red apple", seed=1, num_inference_steps=1).images[0].tobytes()
    assert several.engine("red") is several.engine("red")
    for bad in ("", "../red", str(shelf / "red"), "RED", ".", "red\0"):
        with pytest.raises(ValueError, match="no such model"):
            several.engine(bad)


def test_few_are_kept_and_nothing_of_the_others(several, monkeypatch):
    monkeypatch.setattr(models, "MOST", 1)
    kept = [draw(several.engine("red"))]  # whoever keeps the pictures keeps no model
    kept[0].result(60)
    gone = weakref.ref(several.engine("red").pipe)
    until(lambda: several.waiting == 0)
    for name in ("green", "red", "blue", "green", "red"):
        kept.append(draw(several.engine(name)))
        kept[-1].result(60)
        until(lambda: several.waiting == 0)
        assert len(several.engines) == 2
    gc.collect()
    assert gone() is None
    assert asdict(several.counts) == {"calls": 6, "steps": 6, "pictures": 6, "failed": 0, "cancelled": 0}


def test_one_that_draws_or_was_just_asked_for_does_not_go(several, monkeypatch):
    monkeypatch.setattr(models, "MOST", 1)
    reached, opened = Event(), Event()

    def on_step(*_):
        reached.set()
        assert opened.wait(60)

    drawn = several.engine("red").submit(Request("a red apple", steps=1), on_step=on_step)
    assert reached.wait(60)
    with pytest.raises(QueueFull, match="models are in use"):
        several.engine("green")
    assert several.waiting == 1
    opened.set()
    assert drawn.result(60).images
    until(lambda: several.waiting == 0)
    monkeypatch.setattr(models, "GRACE", 1000.0)
    with pytest.raises(QueueFull):
        several.engine("green")
    assert several.engine("red").alive


def test_one_that_is_damaged_since_is_told_without_its_place(several, tmp_path, shelf, caplog):
    several.folders["damaged"] = tmp_path / "damaged"
    with pytest.raises(Closed, match="'damaged' cannot be opened") as caught:
        several.engine("damaged")
    assert str(tmp_path) not in str(caught.value) and str(tmp_path) in caplog.text
    several.close()
    with pytest.raises(Closed, match="shutting down"):
        several.engine("red")


def test_those_that_are_open_are_had_at_once_while_another_is_opened(several, held_open):
    green = several.engine("green")
    reached, opened = held_open
    with ThreadPoolExecutor() as pool:
        red = pool.submit(several.engine, "red")
        assert reached.wait(60)
        try:
            assert pool.submit(several.engine, "green").result(10) is green
            assert several.ready("red") is None and several.ready() is several.first
        finally:
            opened.set()
        assert red.result(60) is several.engine("red")


@pytest.fixture
def held_open(monkeypatch):
    """The model "red" is opened no further than to the first event until the second is set."""
    reached, opened, read = Event(), Event(), DiffusionFMPipeline.from_pretrained

    def slowly(folder, **how):
        if folder.name == "red":
            reached.set()
            assert opened.wait(60)
        return read(folder, **how)

    monkeypatch.setattr(models.DiffusionFMPipeline, "from_pretrained", slowly)
    return reached, opened


# ------------------------------------------------------------------ over HTTP


def test_a_request_names_its_model(tiny_model, shelf):
    running = Running(tiny_model, models=find_models(shelf)[0])
    try:
        listed = running.client.get("/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["tiny", "blue", "green", "red"]
        assert "defaults" in listed[0] and "defaults" not in listed[3]  # it is not open yet
        body = APPLE | {"seed": 3, "steps": 1}
        answers = {name: running.draw(**body, model=name) for name in (None, "tiny", "red")}
        pixels = {name: picture(answer.json()["data"][0]) for name, answer in answers.items()}
        assert pixels[None].tobytes() == pixels["tiny"].tobytes() != pixels["red"].tobytes()
        assert '"model": "red"' in str(pixels["red"].info)
        assert running.client.get("/v1/models/red").json()["defaults"]["steps"] == 3
        for bad in ("yellow", str(shelf / "red"), "../red", "", 7, ["red"], {}):
            answer = running.draw(**body, model=bad)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found", bad
            assert "'tiny' or 'blue'" in answer.json()["error"]["message"]
        figures = running.client.get("/metrics").text
        assert 'diffusionfm_pictures_total{end="drawn"} 3.0' in figures
    finally:
        running.stop()


def test_many_who_wait_for_a_model_hold_up_nobody_who_does_not(tiny_model, shelf, held_open):
    running = Running(tiny_model, models=find_models(shelf)[0])
    reached, opened = held_open
    body = APPLE | {"seed": 3, "steps": 1}
    try:
        with ThreadPoolExecutor(40) as pool:
            red = [
                pool.submit(running.draw, **body, model="red") for _ in range(36)
            ]  # more than asyncio's threads
            assert reached.wait(60)
            try:
                tiny = [pool.submit(running.draw, **body) for _ in range(2)]
                assert [answer.result(20).status_code for answer in tiny] == [200, 200]
            finally:
                opened.set()
            assert {answer.result(60).status_code for answer in red} == {200}
    finally:
        running.stop()
