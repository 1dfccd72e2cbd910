"""The tabs Vary, Grid and Restore without a browser: what they refuse, clamp, escape and draw."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.components.image_editor import EditorData, EditorDataBlobs
from PIL import Image

from demo import cards, drawtab, grid, restore, runcards, shelf
from demo.editor import CANVAS, MAX_BYTES, MAX_KEPT, _Latest, _opened, canvas_of, editor, painted
from demo.lane import Failed, Lane, Step, Waiting
from demo.vary import HOW_FAR
from diffusionfm.drawing import Cancelled
from diffusionfm.images import encode_png
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Limits, Request
from diffusionfm.serve.models import Models
from diffusionfm.serve.safety import Safety, blurred
from tests.serving import Gate, until


@pytest.fixture
def lane(tiny_pipe):
    with Models(Engine(tiny_pipe)) as models:
        yield Lane(models)


def png(size=(8, 8), **parameters) -> bytes:
    return encode_png(Image.new("RGBA", size, (200, 0, 0, 255)), parameters or None)


# ------------------------------------------------------------------ drawing together


def start(lane, *requests: Request):
    return lane.start("me", [(None, request) for request in requests])


def test_requests_are_drawn_side_by_side_and_in_their_order(lane):
    requests = [Request("a red apple", seed=seed, steps=steps) for seed, steps in ((1, 6), (2, 3), (3, 9))]
    *events, drawn = lane.watch(start(lane, *requests))
    assert [pictures.seeds for pictures in drawn] == [[1], [2], [3]]
    assert lane.models.first.counts.calls < 18  # they shared calls
    told = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in told] == sorted(event.step for event in told)
    assert {event.total for event in told} == {100} and told[0].step <= 100
    looks = [event.previews for event in told if event.previews]
    assert looks and all(len(pictures) == 3 for pictures in looks)


def test_the_time_left_is_that_of_all_together(tiny_pipe):
    with Engine(tiny_pipe, Limits(batch=8)) as engine:
        drawing = start(Lane(Models(engine)), *(Request("a red apple", steps=100, seed=k) for k in range(8)))
        until(lambda: drawing.share > 0.3)
        (first, _), (last, _) = drawing.paces[0], drawing.paces[-1]
        per_step = (last - first) / (len(drawing.paces) / 8)
        assert 20 * per_step < drawing.seconds_left() < 80 * per_step
        drawing.cancel()


def test_a_look_has_finished_pictures_previews_and_frames_for_those_not_begun(tiny_pipe):
    with Engine(tiny_pipe, Limits(batch=1)) as engine:
        gate, lane = Gate(), Lane(Models(engine))
        engine.submit(Request("yellow star", steps=2), "other", gate)
        assert gate.reached.wait(60)
        drawing = start(lane, *(Request("a red apple", seed=k, steps=2) for k in range(3)))
        assert drawing.look() == [None] * 3
        gate.opened.set()
        drawing.futures[0].result(60)
        assert drawing.look()[0].tobytes() == drawing.futures[0].result().images[0].tobytes()
        *_, drawn = lane.watch(drawing)
        assert [picture.tobytes() for picture in drawing.look()] == [
            pictures.images[0].tobytes() for pictures in drawn
        ]


def test_a_look_at_finished_pictures_of_a_flagged_prompt_is_blurred(tiny_pipe):
    with Engine(tiny_pipe, safety=Safety()) as engine:
        drawing = start(Lane(Models(engine)), Request("a nude", steps=1), Request("a red apple", steps=1))
        veiled, plain = [future.result(60).images[0] for future in drawing.futures]
        assert [look.tobytes() for look in drawing.look()] == [blurred(veiled).tobytes(), plain.tobytes()]
        assert blurred(veiled).tobytes() != veiled.tobytes()


def test_who_waits_is_told_the_place_and_of_a_run_under_way(tiny_pipe, monkeypatch):
    with Engine(tiny_pipe, Limits(batch=1)) as engine:
        gate, lane = Gate(), Lane(Models(engine))
        engine.submit(Request("yellow star", steps=2), "other", gate)
        assert gate.reached.wait(60)
        engine.submit(Request("yellow star", steps=1), "another")
        drawing = start(lane, Request("a red apple", steps=2), Request("a red apple", steps=2))
        seen = lane.watch(drawing)
        place = next(seen)
        assert place == Waiting(2)
        monkeypatch.setattr(lane.runs, "company", lambda: "a training is under way.")
        parts = ("stage", "status", "advice", "said", "draw", "cancel")
        tab = drawtab.DrawTab(lane, SimpleNamespace(**{part: part for part in parts}))
        assert "2 drawings of others before yours" in tab._progress(drawing, place)["status"]
        begun = tab._begun(drawing)
        assert "A training is under way.<" in begun["advice"] and begun["said"].endswith(
            "a training is under way."
        )
        gate.opened.set()
        *events, drawn = seen
        assert len(drawn) == 2 and isinstance(events[-1], Step)
        assert "2 pictures · " in tab._progress(drawing, events[-1])["status"]


def test_a_stopped_drawing_stops_all_of_it(lane):
    drawing = start(lane, *(Request("a red apple", steps=500, seed=k) for k in range(4)))
    next(lane.watch(drawing))
    assert lane.cancel("me") and drawing.cancelled
    until(lambda: not lane.models.first.waiting)
    assert lane.models.first.counts.cancelled == 4
    with pytest.raises(Cancelled):
        list(lane.watch(drawing))


def test_one_that_fails_stops_the_others_and_is_told(lane, monkeypatch):
    step = lane.models.first._advance

    def broken(batch):
        if any(picture.task.seed == 2 for picture in batch):
            raise RuntimeError("broken")
        step(batch)

    monkeypatch.setattr(lane.models.first, "_advance", broken)
    drawing = start(lane, *(Request("a red apple", steps=500, seed=k) for k in range(4)))
    with pytest.raises(Failed):
        list(lane.watch(drawing))
    until(lambda: not lane.models.first.waiting)
    counts = lane.models.first.counts
    assert (counts.failed, counts.cancelled, counts.pictures) == (1, 3, 0)


def test_what_the_engine_refuses_leaves_nothing(lane):
    with pytest.raises(ValueError, match="steps must be from 1 to 500"):
        start(lane, Request("a red apple", steps=5), Request("a red apple", steps=0))
    until(lambda: not lane.models.first.waiting)
    assert lane.busy == 0


# ------------------------------------------------------------------ pictures that a page sends


def test_a_data_url_is_the_picture_or_an_error():
    assert shelf.bytes_of(cards.data_url(png())) == png()
    for bad in ("", "data:image/svg+xml;base64,AAAA", "http://127.0.0.1/a.png", "data:image/png;base64,@@"):
        with pytest.raises(ValueError):
            shelf.bytes_of(bad)
    with pytest.raises(ValueError, match="tick its Show anyway"):
        shelf.bytes_of(shelf.VEILED)
    with pytest.raises(ValueError, match="no picture yet"):
        shelf.bytes_of("data:image/png;base64," + "A" * shelf.MAX_URL)


def test_the_editor_opens_with_care_and_forgets():
    made = editor("Picture", "some-id")
    assert made.get_config()["elem_id"] == "some-id" and made.get_block_name() == "imageeditor"
    assert "accept_blobs" in made.get_config()["server_fns"]
    bomb = io.BytesIO()
    Image.new("1", (25_000, 25_000)).save(bomb, "PNG")
    for bad in (b"<svg/>", bomb.getvalue()):
        with pytest.raises(gr.Error):
            made.convert_and_format_image(bad)
    assert _opened(png()).mode == "RGBA" and _opened(None) is None

    class Data:
        def __init__(self, index):
            self.data = {"type": "layer", "index": index, "id": "a"}
            self.files = [("file", png())]

    made.accept_blobs(Data("0"))
    for index in ("1000000000", "-1", "x"):
        with pytest.raises(gr.Error):
            made.accept_blobs(Data(index))
    assert len(made.blob_storage["a"].layers) == 1
    kept = _Latest()
    for k in range(2 * MAX_KEPT):
        kept[str(k)] = blobs(b"a")
    assert list(kept) == [str(k) for k in range(MAX_KEPT, 2 * MAX_KEPT)]


def blobs(*parts: bytes) -> EditorDataBlobs:
    return EditorDataBlobs(background=None, layers=[None, *parts], composite=parts[0])


def test_paint_that_was_pushed_out_is_missed_and_not_taken_for_none():
    made, many = editor("Picture", "some-id"), MAX_BYTES // 3
    made.blob_storage["mine"] = blobs(png())
    value = made.preprocess(EditorData(id="mine"))
    assert value["composite"].size == value["layers"][0].size == (8, 8)
    made.blob_storage["mine"] = blobs(png())
    for name in ("his", "hers"):
        made.blob_storage[name] = blobs(bytes(many // 2))
    assert list(made.blob_storage) == ["mine", "his", "hers"]
    made.blob_storage["theirs"] = blobs(bytes(many))
    assert list(made.blob_storage) == ["hers", "theirs"]
    with pytest.raises(gr.Error, match="no longer here"):
        made.preprocess(EditorData(id="mine"))
    assert made.preprocess(None) is None and made.preprocess(EditorData())["layers"] == []


def test_paint_is_a_mask_whatever_its_colour_and_wherever_the_picture_lies():
    layer = Image.new("RGBA", (CANVAS, CANVAS))
    value = {"background": None, "layers": [layer], "composite": None}
    assert painted(value, (32, 32)) is None and painted(None, (32, 32)) is None
    layer.paste((0, 0, 0, 255), (128, 256, 256, 384))
    square, wide = painted(value, (32, 32)), painted(value, (32, 16))
    assert square.getbbox() == (8, 16, 16, 24) and wide.getbbox() == (8, 8, 16, 16)
    assert square.getextrema() == (0, 255)
    shown = canvas_of(Image.new("RGBA", (32, 16), "red"))["background"]
    assert shown.size == (CANVAS, CANVAS) and shown.getbbox() == (0, 128, 512, 384)


def test_the_picker_goes_from_subtle_to_anew():
    assert list(HOW_FAR) == ["auto", "subtle", "medium", "strong", "anew"]
    assert list(HOW_FAR.values()) == sorted(HOW_FAR.values()) and HOW_FAR["anew"] == 1


# ------------------------------------------------------------------ what a file tells


BAD = '<img src=x onerror="alert(1)">'


def test_nothing_from_a_file_becomes_markup(tmp_path):
    file = tmp_path / "sheet.png"
    file.write_bytes(png())
    for html in (
        restore.tell(png(), {"prompt": BAD, "model": BAD, "lora": [BAD]}, ["icons"]),
        shelf.shelf([png()], [BAD], [7], take="Vary this"),
        cards.empty(BAD, BAD),
        cards.note(BAD),
        runcards.lines(BAD, [BAD], [BAD]),
        runcards.pictures([(BAD, png())]),
        runcards.sheet(file, BAD),
        grid._figure(png(), BAD, "sheet", flagged=True),
    ):
        assert "<img src=x" not in html and "&lt;img" in html


def test_another_model_and_a_missing_picture_are_told():
    there = ["icons", "clouds"]
    assert "&#x27;photo&#x27; that drew it is not here" in restore.tell(png(), {"model": "photo"}, there)
    assert "not here" not in restore.tell(png(), {"prompt": "a", "model": "clouds"}, there)
    assert "drawn from another picture" in restore.tell(png(), {"prompt": "a", "strength": 0.5}, there)
    assert "tells nothing" in restore.tell(png(), {}, there)
    assert base64.b64encode(png()).decode() in restore.tell(png(), {}, there)
