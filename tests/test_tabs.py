"""The Fine-tune and Batch tabs without a browser: what their events do, with real runs of a tiny model."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.helpers import special_args
from PIL import Image

from demo import batch, batch_controls, finetune, finetune_controls, processes
from demo.adapters import choices, chosen, pickers, put_on
from demo.lane import Lane
from demo.models import model_picker
from demo.person import person
from demo.runs import Runs, State, new_person
from diffusionfm.batch import generate_batch
from diffusionfm.batch.watch import look
from diffusionfm.images import read_parameters, save_png
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.gate import TAKEN
from diffusionfm.serve.jobs import Closed, QueueFull, Request
from diffusionfm.serve.models import Models
from tests.finetune_toys import draw_pictures
from tests.serving import near, write_lora

ME, YOU = new_person(), new_person()
CAPTIONS = ("name", "")
ROWS = ("a red apple", None, 1, 0, "png", "folder", "none", 1.0, None)
PAGE = SimpleNamespace(session_hash="page", state=SimpleNamespace(caller="login ann"))


@pytest.fixture(scope="module")
def studio(tiny_model, tmp_path_factory):
    """(lane, the Fine-tune tab, the Batch tab) around an engine of their own."""
    runs = Runs(tmp_path_factory.mktemp("studio") / "runs")
    with (
        pytest.MonkeyPatch.context() as patch,
        Models(Engine(DiffusionFMPipeline.from_pretrained(tiny_model))) as models,
    ):
        patch.setattr(processes, "NICE", 0)
        lane = Lane(models, runs)
        with gr.Blocks() as page:
            lane.person, lane.model, lane.pickers = person(page), model_picker(lane), pickers(lane)
            tabs = (
                finetune.Tab(lane, finetune_controls.lay_out()),
                batch.Tab(lane, batch_controls.lay_out(lane)),
            )
        yield lane, *tabs
        runs.close()


@pytest.fixture
def done(studio, tmp_path):
    """A training of mine that is done, its adapter written by hand."""
    lane, *_ = studio
    run = lane.runs.new(ME, "finetune", "rings")
    write_lora(lane.pipe.config["_name_or_path"], run.out, seed=3)
    yield run
    lane.runs.delete(run)


def value(update: dict, part: object) -> object:
    """What an event sets of a component: its value, or the update."""
    found = update[part]
    return found.constructor_args if hasattr(found, "constructor_args") else found


def watched(tab, key: str, *words: str, seconds: float = 400) -> dict:
    """Tick until the run is in one of these states; all that was shown."""
    shown: dict = {}
    for _ in range(int(seconds * 4)):
        shown |= tab.watch(ME, key, shown.get(tab.at.seen, ()))
        if shown[tab.at.seen][0].word in words:
            return shown
        time.sleep(0.25)
    pytest.fail(f"still {shown[tab.at.seen]}")


# ------------------------------------------------------------------ adapters


def test_an_adapter_is_offered_to_its_owner_alone_and_draws_as_it_should(studio, done, tiny_model):
    lane, *_ = studio
    assert choices(lane, ME) == [("none", "none"), ("rings", done.key)]
    assert choices(lane, YOU) == choices(lane, "") == [("none", "none")]
    for who, key in ((YOU, done.key), (ME, "rings"), (ME, "public rings"), (ME, f"../{ME}/{done.key}")):
        with pytest.raises(ValueError, match="is gone"):
            chosen(lane, who, key, 1.0, lane.pipe)
    assert chosen(lane, ME, "none", 1.0, lane.pipe) is None and put_on(lane.models.first, None) == ()
    adapter = chosen(lane, ME, done.key, 0.5, lane.pipe)
    loras = put_on(lane.models.first, adapter)
    drawn = (
        lane.models.first.submit(Request("a red apple", seed=1, steps=4, loras=loras)).result(60).images[0]
    )
    plain = DiffusionFMPipeline.from_pretrained(tiny_model)
    bare = plain("a red apple", seed=1, num_inference_steps=4).images[0]
    plain.load_lora(done.out, 0.5)
    assert near(drawn, plain("a red apple", seed=1, num_inference_steps=4).images[0]) and not near(
        drawn, bare
    )
    assert not lane.pipe.loras and loras[0][0].startswith("rings+")  # the API lists nothing of it


def test_a_page_that_is_opened_shows_nothing_of_others(studio, done):
    lane, tab, _ = studio
    for who in ("", YOU):
        shown = tab.reopen(who)
        assert shown[tab.at.key] == "" and value(shown, tab.at.mine)["choices"] == []
    for event in (tab.stop, tab.delete, tab.use, tab.open):
        event(YOU, done.key)
    assert done.folder.is_dir() and lane.runs.get(ME, "finetune", done.key) == done


# ------------------------------------------------------------------ mistakes


def test_mistakes_are_told_and_begin_nothing(studio, tmp_path):
    lane, tab, rows = studio
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(gr.Error, match="no picture"):
        tab.take(ME, "", [str(tmp_path / "a.txt")], "x", *CAPTIONS)
    with pytest.raises(gr.Error, match="upload some pictures"):
        tab.start(ME, "", PAGE, [], "x", "laptop", "lora", 10, False, *CAPTIONS)
    files = [str(path) for path in draw_pictures(tmp_path / "mine", 2).iterdir()]
    with pytest.raises(gr.Error, match="load it again"):
        tab.take("../x", "", files, "x", *CAPTIONS)
    key = tab.take(ME, "", files, "x", *CAPTIONS)[tab.at.key]
    table = [["circle 00.jpg", "[trigger]"]]
    for settings, words in (
        (("laptop", "lora", 10, False, "name", ""), "give the trigger word"),
        (("laptop", "lora", 10, False, "name", "two words"), "one short word"),
        (("laptop", "lora", 0, False, "name", "zkw"), "steps must be"),
        (("laptop", "lora", 10**9, False, "name", "zkw"), "steps must be"),
        (("laptop", "ia3", 10, False, "name", "zkw"), "method must be"),
    ):
        with pytest.raises(gr.Error, match=words):
            tab.start(ME, key, PAGE, table, "x", *settings)
    assert lane.runs.state(lane.runs.get(ME, "finetune", key)).word == "draft"
    tab.delete(ME, key)
    for k, bad, words in (
        (0, " \n", "write a prompt"),
        (1, str(tmp_path / "rows.exe"), "rows come as"),
        (2, 0, "images must be"),
        (2, None, "pictures a row is empty"),
        (3, -1, "seed must be"),
        (3, None, "the seed of the run is empty: write a number there"),
        (7, None, "weight is empty: write a number"),
        (4, "bmp", "bmp"),
        (5, "../out", "unknown output"),
        (6, "public nowhere", "is gone"),
        (0, ("{" + "|".join(f"a{k}" for k in range(90)) + "}\n") * 150, "more than 10,000 rows"),
        (0, "fish\na red apple --s 500 --w 1024 --h 1024", "row a-red-apple-.*524,288,000 pixels x steps"),
        (0, "fish --s 300\n" * 101, "more work than 10,000 pictures"),
    ):
        asked = [*ROWS[:k], bad, *ROWS[k + 1 :]]
        with pytest.raises(gr.Error, match=words):
            rows.start(ME, "", PAGE, *asked)
    assert lane.runs.all(ME) == []


@pytest.mark.parametrize(
    "error", [QueueFull("too many", 1.0), Closed("closing"), OSError("disk full"), KeyError("x")]
)
def test_whatever_goes_wrong_a_batch_leaves_no_run_and_keeps_a_draft(studio, monkeypatch, error):
    lane, _, tab = studio

    def fail(*_):
        raise error

    draft = tab.write(ME, "", *ROWS)
    before = draft.facts
    for key in ("", draft.key):
        with pytest.raises(gr.Error, match="write a prompt"):
            tab.start(ME, key, PAGE, " ", *ROWS[1:])
        with monkeypatch.context() as patch, pytest.raises((gr.Error, KeyError)):
            patch.setattr(tab, "_flagged", fail)
            tab.write(ME, key, "another", *ROWS[1:])
        assert lane.runs.all(ME) == [draft] and draft.facts == before
    tab.delete(ME, draft.key)


def test_a_run_without_settings_does_not_bar_the_tab(studio):
    lane, *tabs = studio
    for tab in tabs:
        run = lane.runs.new(ME, tab.kind, "x")  # the studio was killed before it had any
        shown = tab.reopen(ME)
        assert shown[tab.at.key] == run.key and value(shown, tab.at.mine)["choices"] == [("x", run.key)]
        assert value(shown, tab.at.delete)["interactive"]
        tab.delete(ME, run.key)
        assert lane.runs.all(ME) == []


def test_a_draft_keeps_what_was_written_over_a_reload_and_over_a_bad_upload(studio, tmp_path):
    lane, tab, _ = studio
    at = tab.at
    files = [str(path) for path in draw_pictures(tmp_path / "mine", 2).iterdir()]
    key = tab.take(ME, "", files, "rings", "name", "")[at.key]
    table = value(tab.reopen(ME), at.table)["value"]
    table[0][1] = "a ruby ring"
    tab.edit(ME, key, table)
    tab.keep(ME, key, "my rings", "skip", "zkw", "laptop", "dora", 77, True)
    (tmp_path / "bad.svg").write_text("<svg/>")
    with pytest.raises(gr.Error, match="bad.svg is neither"):
        tab.take(ME, key, [str(tmp_path / "bad.svg")], "rings", "name", "")
    shown = tab.reopen(ME)
    kept = [value(shown, getattr(at, name))["value"] for name in finetune.FORM]
    assert kept == ["my rings", "skip", "zkw", "laptop", "dora", 77, True]
    assert value(shown, at.table)["value"] == table and shown[at.key] == key
    shown = tab.take(
        ME, key, files, "my rings", "name", "zkw"
    )  # other pictures: other captions, the same form
    assert value(shown, at.table)["value"][0][1] != "a ruby ring"
    kept = [value(shown, getattr(at, name))["value"] for name in finetune.FORM]
    assert kept == ["my rings", "name", "zkw", "laptop", "dora", 77, True]
    for event in (tab.edit, tab.keep):
        assert event(YOU, key, []) is None and event(ME, "", []) is None  # not theirs, and none
    with pytest.raises(gr.Error, match="the steps are empty"):
        tab.start(ME, key, PAGE, table, "x", "laptop", "lora", None, False, *CAPTIONS)
    tab.delete(ME, key)


def test_a_batch_is_packed_whole_and_once_for_each_end(studio, monkeypatch):
    lane, _, tab = studio
    run = tab.write(ME, "", *ROWS)
    run.out.mkdir(parents=True)
    (run.out / "a.png").write_bytes(b"one")
    (run.folder / "state.json").write_text('{"word": "stopped"}')
    archive = run.folder / f"{run.slug}.zip"
    first = value({tab: tab._taken(run)}, tab)["value"][0]
    inode = archive.stat().st_ino
    assert zipfile.ZipFile(first).namelist() == [f"{run.slug}/a.png"]
    tab._taken(run)
    assert archive.stat().st_ino == inode  # it was not packed again
    (run.out / "b.png").write_bytes(b"two")
    (run.folder / "state.json").unlink()  # it was taken up, and ended
    (run.folder / "state.json").write_text('{"word": "done"}')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "write", interrupted)
        tab._taken(run)
    assert archive.stat().st_ino == inode and zipfile.is_zipfile(archive)  # what was whole stays so
    last = value({tab: tab._taken(run)}, tab)["value"][0]
    assert len(zipfile.ZipFile(last).namelist()) == 2 and len(zipfile.ZipFile(first).namelist()) == 1
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]
    assert Path(last).parents[1].name == TAKEN  # and is not counted for an upload
    tab.delete(ME, run.key)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_run_takes_its_login_s_turn(studio, monkeypatch):
    lane, _, tab = studio
    begun = []
    monkeypatch.setattr(lane.runs, "start", lambda run, commands, turn: begun.append(turn))
    for caller in ("login ann", "key 2", "127.0.0.1"):
        page = SimpleNamespace(state=SimpleNamespace(caller=caller))
        args, *_ = special_args(tab.start, [ME, "", *ROWS], page)  # as Gradio calls it
        tab.delete(ME, tab.start(*args)[tab.at.key])
    assert begun[:2] == ["login ann", "key 2"] and begun[2].startswith("127.0.0.1 ") and ME not in begun[2]


BAD = "<img src=x onerror=alert(1)>"


def test_a_batch_shows_what_rows_say_as_words(studio):
    lane, _, tab = studio
    run = lane.runs.new(ME, "batch", BAD)
    run.keep(total=3, flagged=[BAD + "!"])
    run.out.mkdir(parents=True)
    save_png(Image.new("RGBA", (8, 8)), run.out / "a.png")
    made = {"id": BAD, "prompt": BAD, "file": "a.png", "seconds": 1.0}
    records = [made | {"status": "ok"}, made | {"status": "failed", "error": BAD}]
    (run.out / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = look(run.out)
    for word in ("running", "stopped", "failed"):
        html = tab._status(run, State(word), found) + batch._pictures(run, found)
        assert "<img src=x" not in html and html.count("&lt;img src=x") >= 4
    lane.runs.delete(run)


def test_a_table_of_pictures_shows_names_and_captions_as_words(studio, tmp_path):
    _, tab, _ = studio
    folder = draw_pictures(tmp_path / "mine", 3)
    (folder / "circle 01.txt").write_text(BAD)
    (folder / "circle 02.txt").unlink()
    (folder / "circle 02.png").rename(folder / f"{BAD}.png")
    (folder / f"{BAD} broken.png").write_bytes(b"no picture")
    key = tab.take(ME, "", [str(path) for path in folder.iterdir()], BAD, "refuse", "")[tab.at.key]
    report = tab.open(ME, key)[tab.at.report]
    assert "<img src=x" not in report and report.count("&lt;img src=x") >= 2
    table = tab.at.table.get_config()  # of text alone: neither HTML nor Markdown is shown in it
    assert table["datatype"] == "str" and BAD in str(value(tab.open(ME, key), tab.at.table)["value"])
    tab.delete(ME, key)


# ------------------------------------------------------------------ from end to end


@pytest.mark.slow
def test_pictures_become_an_adapter(studio, tmp_path):
    lane, tab, rows = studio
    at = tab.at
    pictures = draw_pictures(tmp_path / "mine", 12)
    key = tab.take(ME, "", [str(path) for path in pictures.iterdir()], "rings", *CAPTIONS)[at.key]
    table = value(tab.look(ME, key, [], "skip"), at.table)["value"]
    table[0][1] = "a ruby ring"
    table = value(tab.look(ME, key, table, "name"), at.table)["value"]
    assert table[0][1] == "a ruby ring" and table[1][1] == "a blue circle, my style"
    shown = tab.start(ME, key, PAGE, table, "rings", "laptop", "lora", 60, False, *CAPTIONS)
    assert value(shown, at.stop)["interactive"] and value(shown, at.timer)["active"]
    while not watched(tab, key, "running", "failed")[at.seen][1]:
        time.sleep(0.3)
    assert "training is under way" in lane.runs.company()
    tab.stop(ME, key)
    shown = watched(tab, key, "stopped")
    assert "Resume goes on" in shown[at.status] and "<svg" in shown[at.curves]
    assert value(shown, at.start)["value"] == "Resume"
    tab.start(ME, key, PAGE, table, "rings", "laptop", "lora", 60, False, *CAPTIONS)
    shown = watched(tab, key, "done", "failed")
    assert "It took all 60 steps" in shown[at.status] and "the one that is kept" in shown[at.stage], shown[
        at.status
    ]
    names = [Path(file).name for file in value(shown, at.take)["value"]]
    assert names == ["rings-lora.zip", "rings.safetensors", "report.html"]
    run = lane.runs.get(ME, "finetune", key)
    captions = (run.folder / "pictures/metadata.jsonl").read_text().splitlines()
    assert json.loads(captions[0])["text"] == "a ruby ring" and len(captions) == 12
    assert ("rings", key) in value(shown, lane.pickers["create"].choice)["choices"]

    asked = ("a red circle, my style\na {blue|green} circle", None, 1, 5, "png", "folder", key, 0.8, None)
    planned = list(rows.plan(ME, "", *asked))
    assert "3 rows, 3 pictures: 3 to make" in planned[-1][rows.at.report]
    batch_key = planned[0][rows.at.key]
    rows.start(ME, batch_key, PAGE, *asked)
    shown = watched(rows, batch_key, "done", "failed")
    assert "3 pictures drawn" in shown[rows.at.status] and shown[rows.at.stage].count("<img") == 3
    with zipfile.ZipFile(value(shown, rows.at.take)["value"][0]) as archive:
        found = [name for name in archive.namelist() if name.endswith(".png") and "sheets" not in name]
        with archive.open(found[0]) as file:
            assert read_parameters(file)["lora"] == ["rings:0.8"]
        assert len(found) == 3 and any(name.endswith("manifest.jsonl") for name in archive.namelist())
    assert rows.open(YOU, batch_key)[rows.at.key] == ""


@pytest.mark.slow
def test_a_failed_row_is_told_and_tried_again(studio):
    _, _, tab = studio
    asked = ("a red apple\nyellow star --s 0\n", None, 1, 0, "webp", "webdataset", "none", 1.0, None)
    shown = tab.start(ME, "", PAGE, *asked)
    key = shown[tab.at.key]
    shown = watched(tab, key, "failed", "done")
    assert "1 pictures drawn, 1 failed" in shown[tab.at.status] and "steps must be" in shown[tab.at.status]
    assert value(shown, tab.at.start)["value"] == "Try again"
    assert [Path(file).name for file in value(shown, tab.at.take)["value"]][0] == "00000.tar"
    assert "The first pictures" in shown[tab.at.stage]


def test_flagged_pictures_of_a_batch_are_not_shown(studio, tiny_pipe):
    _, _, tab = studio
    lines = "a red apple\na nude \\{big}\n{bare|pretty} feet, erotic\nerotic --s 0\n"
    run = tab.write(ME, "", lines, None, 2, 0, "png", "folder", "none", 1.0, None)
    assert run.facts["flagged"] == ["a nude {big}", "bare feet, erotic", "pretty feet, erotic"]
    generate_batch(run.folder / "rows.txt", tiny_pipe, run.out, repeats=2, progress=False)
    stage = tab.progress(ME, run, ())[tab.at.stage]
    assert stage.count("<img") == 2 and stage.count('alt="a red apple"') == 2
    assert "Not shown, for what its prompt says: a nude {big}" in stage
    tab.delete(ME, run.key)


@pytest.mark.slow
def test_an_uploaded_file_is_drawn(studio, tmp_path):
    _, _, tab = studio
    file = tmp_path / "my rows.csv"
    file.write_text("id,prompt,width,seed\none,a red apple,48,7\ntwo,{a blue|a yellow} fish,,\n")
    key = tab.start(ME, "", PAGE, "", str(file), 1, 0, "png", "folder", "none", 1.0, None)[tab.at.key]
    shown = watched(tab, key, "done", "failed")
    assert "3 pictures drawn" in shown[tab.at.status], shown[tab.at.status]
    with zipfile.ZipFile(value(shown, tab.at.take)["value"][0]) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        with archive.open(names["one.png"]) as picture:
            said = read_parameters(picture)
    assert {"one.png", "two-1.png", "two-2.png"} < set(names)
    assert (said["prompt"], said["width"], said["seed"]) == ("a red apple", 48, 7)


def test_a_batch_draws_as_the_studio_does(studio, monkeypatch):
    lane, _, tab = studio
    run = lane.runs.new(ME, "batch", "x")
    settings = {
        "repeats": 1,
        "seed": 0,
        "format": "png",
        "to": "folder",
        "adapter": "public house",
        "weight": 0.5,
        "model": None,
    }
    monkeypatch.setitem(lane.pipe.loras, "house", 1.0)
    monkeypatch.setitem(lane.pipe.lora_sources, "house", Path("/adapters/house"))
    monkeypatch.setattr(lane.pipe, "fast", True)
    command = tab._command(ME, run, run.folder / "rows.txt", settings)
    as_opened = ["--fast", "--dtype", "float32", "--lora", "/adapters/house:0.5", "--lora-any"]
    assert command[-6:] == as_opened
    lane.runs.delete(run)
