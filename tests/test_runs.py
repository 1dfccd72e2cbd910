"""Long runs of the studio: one after the other, stopped, taken up again, told apart by person; datasets taken in."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from demo import dataset, processes, runs
from demo.runs import Run, Runs, State, new_person
from diffusionfm.serve import gate
from tests.finetune_toys import draw_pictures


@pytest.fixture
def lane(tmp_path):
    lane = Runs(tmp_path / "runs")
    yield lane
    lane.close()


@pytest.fixture
def sleeper(monkeypatch):
    """Commands are shell words for this test: what counts is the process, not what it computes."""
    monkeypatch.setattr(processes, "_line", lambda command: ["sh", "-c", command[0]])


def until(lane: Runs, run: Run, *words: str, seconds: float = 60) -> State:
    for _ in range(int(seconds * 20)):
        state = lane.state(run)
        if state.word in words:
            return state
        time.sleep(0.05)
    pytest.fail(f"still {state.word}, not {words}")


def test_people_find_their_own_runs_alone(lane, tmp_path):
    me, you = new_person(), new_person()
    mine = lane.new(me, "finetune", "My Style!")
    assert mine.key.startswith("my-style-") and mine.folder.parent.name == mine.person
    assert lane.all(me) == [mine] and lane.all(me, "batch") == [] and lane.all(you) == []
    assert lane.get(me, "finetune", mine.key) == mine and lane.get(you, "finetune", mine.key) is None
    assert lane.state(mine) == State("draft")
    (tmp_path / "secret").mkdir()
    for bad in ("", None, "..", "../secret", me[:-1], me.upper() + "x", f"{me}/..", 7, [me]):
        assert lane.all(bad) == []
        with pytest.raises(ValueError, match="load it again"):
            lane.new(bad, "finetune", "x")
    for bad in ("..", "", None, "../" + mine.key):
        assert lane.get(me, "finetune", bad) is None


def test_no_path_tells_the_secret_and_no_other_user_lists_it(lane, sleeper):
    me = new_person()
    run = lane.new(me, "batch", "a")
    assert me not in str(run.folder) and not runs.is_person(run.person) and lane.all(run.person[:32]) == []
    for folder in (lane.root, run.folder.parent, run.folder):
        assert folder.stat().st_mode & 0o077 == 0
    lane.start(run, [["pwd; ls"]])  # commands run inside, so that their paths tell nothing
    until(lane, run, "done")
    assert (run.folder / "log.txt").read_text().split()[0] == str(run.folder)


def test_runs_of_an_older_studio_are_found_and_tell_the_secret_no_more(lane):
    me = new_person()
    old = lane.root / me / "rings-1"
    (old / "made" / "rings").mkdir(parents=True)
    told = {
        "kind": "finetune",
        "name": "rings",
        "created": 1.0,
        "commands": [["finetune", f"{old}/pictures"]],
    }
    (old / "run.json").write_text(json.dumps(told))
    (old / "made/rings/config.yaml").write_text(f"data: {old}/pictures\n")
    (old / "rings-lora.zip").write_bytes(b"packed")
    run = lane.get(me, "finetune", "rings-1")
    assert lane.state(run).word == "stopped" and not (lane.root / me).exists()
    assert run.facts["commands"] == [["finetune", f"{run.folder}/pictures"]]
    assert (run.out / "config.yaml").read_text() == f"data: {run.folder}/pictures\n"
    assert not (run.folder / "rings-lora.zip").exists()


def test_too_many_runs_are_refused_and_deleted_ones_make_room(lane, monkeypatch):
    monkeypatch.setattr(runs, "MOST_RUNS", 2)
    me = new_person()
    first, _ = lane.new(me, "batch", "a"), lane.new(me, "finetune", "b")
    with pytest.raises(ValueError, match="delete one"):
        lane.new(me, "batch", "c")
    lane.delete(first)
    assert not first.folder.exists()
    lane.new(me, "batch", "c")


def test_a_full_disk_is_told_before_a_run_is_begun(lane, monkeypatch):
    me = new_person()
    (lane.new(me, "batch", "a").folder / "big").write_bytes(bytes(3000))
    monkeypatch.setattr(runs, "MOST_BYTES", 2000)
    with pytest.raises(ValueError, match="no room on the disk for another run"):
        lane.new(me, "batch", "b")
    monkeypatch.setattr(runs, "MOST_BYTES", 2**60)
    monkeypatch.setattr(gate, "SPARE", 2**80)
    with pytest.raises(ValueError, match="no room on the disk for another run"):
        lane.new(me, "batch", "b")
    monkeypatch.undo()
    lane.new(me, "batch", "b")


def test_people_take_turns_and_nobody_takes_every_place(lane, sleeper):
    me, you, third = new_person(), new_person(), new_person()
    first, *mine = [lane.new(me, "batch", str(k)) for k in range(5)]
    lane.start(first, [["echo up; exec sleep 100"]])
    until(lane, first, "running")
    for run in mine[:3]:
        lane.start(run, [["echo up; exec sleep 100"]])
    with pytest.raises(ValueError, match="3 of yours are waiting already: start it once one has its turn"):
        lane.start(mine[3], [["echo"]])
    assert lane.state(mine[3]).word == "draft"
    yours, theirs = lane.new(you, "finetune", "x"), lane.new(third, "batch", "y")
    again = lane.new(you, "finetune", "z")
    for run in (yours, theirs, again):
        lane.start(run, [["echo up; exec sleep 100"]])
    order = [yours, theirs, mine[0], again, *mine[1:3]]
    assert [lane.state(run).before for run in order] == [1, 2, 3, 4, 5, 6]
    lane.stop(first)
    until(lane, yours, "running")
    assert [lane.state(run).before for run in order[1:]] == [1, 2, 3, 4, 5]
    lane.stop(mine[2])
    lane.start(mine[3], [["echo"]])  # there is a place again
    assert lane.state(mine[3]).before == 5


def test_one_at_a_time_in_the_order_of_their_coming(lane, sleeper):
    me, you = new_person(), new_person()
    first, second, third = (
        lane.new(me, "finetune", "1"),
        lane.new(you, "batch", "2"),
        lane.new(me, "batch", "3"),
    )
    lane.start(first, [["sleep 0.6; echo one"], ["echo two"]])
    until(lane, first, "running")
    lane.start(second, [["echo 'error: no good' >&2; exit 2"], ["echo never"]])
    lane.start(third, [["echo three"]])
    assert lane.state(second) == State("waiting", 1) and lane.state(third) == State("waiting", 2)
    assert "training is under way" in lane.company()
    for busy in (first, second):
        with pytest.raises(ValueError, match="under way"):
            lane.start(busy, [["echo"]])
        with pytest.raises(ValueError, match="stop it first"):
            lane.delete(busy)
    until(lane, third, "done")
    assert (lane.state(first).word, lane.state(second).word) == ("done", "failed")
    assert (first.said, second.said, second.problem) == ("two", "", "no good")
    assert lane.company() == ""


def test_stopping_ends_the_process_and_the_next_goes_on(lane, sleeper):
    me = new_person()
    first, second = lane.new(me, "batch", "1"), lane.new(me, "batch", "2")
    lane.start(first, [["echo $$; exec sleep 100"]])
    lane.start(second, [["echo $$; exec sleep 100"]])
    until(lane, first, "running")
    while not first.said:
        time.sleep(0.02)
    lane.stop(first)
    assert until(lane, first, "stopped") and until(lane, second, "running")
    assert not Path(f"/proc/{first.said}/cmdline").exists()
    lane.start(first, [["echo again"]])
    lane.stop(first)  # before its turn has come
    assert lane.state(first).word == "stopped"
    lane.stop(second)
    until(lane, second, "stopped")
    lane.start(first, [["echo again"]])
    until(lane, first, "done")


def test_who_does_not_listen_is_killed(lane, sleeper, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    run = lane.new(new_person(), "batch", "1")
    lane.start(run, [["trap '' TERM; echo up; sleep 100; sleep 100"]])
    while not run.said:
        time.sleep(0.02)
    lane.stop(run)
    assert lane.state(run).word == "stopping"
    assert until(lane, run, "stopped", seconds=20)


def test_who_was_asked_to_stop_is_killed_and_not_who_took_up_the_run(lane, sleeper, monkeypatch):
    timers = []

    def timer(seconds, act, given):
        timers.append(lambda: act(*given))
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(processes, "threading", SimpleNamespace(Timer=timer))
    run = lane.new(new_person(), "batch", "1")
    lane.start(run, [["echo up; exec sleep 100"]])
    while not run.said:
        time.sleep(0.02)
    lane.stop(run)
    until(lane, run, "stopped")
    lane.start(run, [["echo again; exec sleep 100"]])
    while run.said != "again":
        time.sleep(0.02)
    timers[0]()  # the patience with the first has an end
    assert lane.state(run).word == "running"
    processes._signal((run.folder / processes.PID).read_text(), 0)  # it lives
    lane.stop(run)
    until(lane, run, "stopped")


def test_a_run_that_outlives_its_studio_is_seen_stopped_and_not_begun_twice(tmp_path, sleeper):
    me, gone = new_person(), Runs(tmp_path / "runs")
    run = gone.new(me, "finetune", "1")
    gone.start(run, [["echo up; exec sleep 100"]])
    while not run.said or not (run.folder / processes.PID).is_file():
        time.sleep(0.02)
    gone._worker = None  # that studio is no more
    again = Runs(tmp_path / "runs")
    assert again.all(me) == [run] and again.state(run).word == "running"
    with pytest.raises(ValueError, match="under way"):
        again.start(run, [["echo"]])
    again.stop(run)
    assert until(again, run, "stopped", "failed")


def test_what_is_deleted_is_not_begun_and_nothing_ends_the_lane(lane, sleeper, monkeypatch):
    me = new_person()
    gone, bad, good = (lane.new(me, "batch", name) for name in ("gone", "bad", "good"))
    removed = []
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", lambda folder, **_: removed.append((folder, lane.all(me))))
        lane.delete(gone)
    assert (
        removed[0][0].parent == gone.folder.parent and gone not in removed[0][1]
    )  # out of sight before it goes
    with pytest.raises(ValueError, match="it was deleted meanwhile"):
        lane.start(gone, [["echo"]])
    lane.start(bad, [[]])
    lane.start(good, [["echo up"]])
    until(lane, good, "done")
    assert lane.state(bad).word == "failed" and "it could not be run" in bad.problem


def test_a_broken_file_hides_its_run_alone(lane):
    me = new_person()
    good, *broken = (lane.new(me, "batch", str(k)) for k in range(5))
    for run, text in zip(broken, ("{", "[]", "{}", '{"created": "x"}'), strict=True):
        (run.folder / "run.json").write_text(text)
    assert lane.all(me) == lane.all(me, "batch") == [good]
    lane._current = broken[0]
    assert "under way" in lane.company()
    lane._current = None


def test_logins_share_their_places_whatever_secrets_they_make_up(lane, sleeper):
    begun = [lane.new(new_person(), "batch", str(k)) for k in range(6)]
    for run in begun[:4]:
        lane.start(run, [["echo up; exec sleep 100"]], "login ann")
        until(lane, begun[0], "running")
    with pytest.raises(ValueError, match="3 of yours are waiting already"):
        lane.start(begun[4], [["echo"]], "login ann")
    lane.start(begun[5], [["echo"]], "login bob")
    assert lane.state(begun[5]).before == 1 and lane.state(begun[1]).before == 2


def test_closing_the_studio_stops_its_runs(tmp_path, sleeper):
    lane, me = Runs(tmp_path / "runs"), new_person()
    first, second = lane.new(me, "batch", "1"), lane.new(me, "batch", "2")
    lane.start(first, [["echo up; exec sleep 100"]])
    lane.start(second, [["echo up; exec sleep 100"]])
    while not first.said:
        time.sleep(0.02)
    lane.close()
    assert [Runs(tmp_path / "runs").state(run).word for run in (first, second)] == ["stopped", "stopped"]


def test_commands_step_back_behind_drawings():
    line = processes._line(["batch", "rows.txt"])
    assert line[:3] == ["nice", "-n", "10"] and line[-4:] == ["-m", "diffusionfm.cli", "batch", "rows.txt"]


# ------------------------------------------------------------------ datasets


@pytest.fixture
def draft(lane):
    return lane.new(new_person(), "finetune", "mine")


def test_pictures_and_captions_become_a_table_and_are_trained_on_as_it_says(draft, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 4)
    (folder / "circle 03.txt").unlink()
    before = sorted(path.name for path in folder.iterdir())
    dataset.take_in(draft, [str(path) for path in folder.iterdir()])
    report, rows, sheet = dataset.look_through(draft, 32, "name")
    assert [row[1] for row in rows] == [
        "a red circle, my style",
        "a blue circle, my style",
        "a green circle, my style",
        "circle",
    ]
    assert report.missing == [rows[3][0]] and Image.open(sheet).width > 100
    rows[0][1], rows[1][1] = "a ruby", ""
    with pytest.raises(ValueError, match=f"no caption: {rows[1][0]}"):
        dataset.settle(draft, rows, "refuse")
    dataset.settle(draft, [*rows, ["../../outside.png", "x"]], "skip")
    _, again, _ = dataset.look_through(draft, 32, "skip")
    assert [row[1] for row in again] == ["a ruby", "", "a green circle, my style", "circle"]
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(ValueError, match="write some in the table"):
        dataset.settle(draft, [[name, " "] for name, _ in rows], "skip")


def test_a_zip_keeps_its_folders_and_tables(draft, tmp_path):
    folder = draw_pictures(tmp_path / "mine", 3)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.glob("*.[pj]*g"):
            archive.write(path, f"train/{path.name}")
        archive.writestr("metadata.csv", "file_name,text\ntrain/circle 01.png,one\n")
    dataset.take_in(draft, [str(tmp_path / "set.zip")])
    _, rows, _ = dataset.look_through(draft, 32, "trigger")
    assert dict(rows)["train/circle 01.png"] == "one" and list(dict(rows).values()).count("[trigger]") == 2
    dataset.settle(draft, rows, "trigger")
    assert dataset.look_through(draft, 32, "refuse")[1] == rows


def refuse_outside(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.png", b"x")


def refuse_growth(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(40):
            archive.writestr(f"{k}.png", bytes(15 * 2**20))


def refuse_text(path: Path) -> None:
    path.write_bytes(b"no zip")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(refuse_outside, "leads outside"), (refuse_growth, "at most"), (refuse_text, "is not a zip")],
)
def test_bad_zips_are_refused_by_name_and_leave_nothing(spoil, words, draft, tmp_path):
    spoil(tmp_path / "bad.zip")
    with pytest.raises(ValueError, match=words) as caught:
        dataset.take_in(draft, [str(tmp_path / "bad.zip")])
    assert str(tmp_path) not in str(caught.value) and "bad.zip" in str(caught.value)
    assert not [path for path in (draft.folder / "pictures").rglob("*") if path.is_file()]
    assert not (tmp_path / "evil.png").exists()


def zips_of(folder: Path, place: Path) -> list[str]:
    """A zip of each picture."""
    made = []
    for path in sorted(folder.glob("*.[pj]*g")):
        made.append(str(place / f"{path.stem}.zip"))
        with zipfile.ZipFile(made[-1], "w") as archive:
            archive.write(path, path.name)
    return made


def test_the_limits_are_those_of_an_upload_and_not_of_each_zip(draft, tmp_path, monkeypatch):
    folder = draw_pictures(tmp_path / "mine", 4)
    zips = zips_of(folder, tmp_path)
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.[pj]*g"))]
    monkeypatch.setattr(dataset, "MOST_BYTES", sum(sizes))
    dataset.take_in(draft, zips)
    held = sorted(path.relative_to(draft.folder) for path in draft.folder.rglob("*"))
    for name, most, words in (
        ("MOST_BYTES", sum(sizes) - 1, "at most"),
        ("MOST_PICTURES", 2, "3 pictures: the studio takes 2"),
        ("SPARE", 2**80, "than there is room for"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
            patch.setattr(dataset, name, most)
            dataset.take_in(draft, zips)
        assert sorted(path.relative_to(draft.folder) for path in draft.folder.rglob("*")) == held
    texts = tmp_path / "texts.zip"
    with zipfile.ZipFile(texts, "w") as archive:
        for k in range(110):
            archive.writestr(f"{k}.txt", "a")
    monkeypatch.setattr(dataset, "MOST_BYTES", 2**20)
    monkeypatch.setattr(dataset, "MOST_PICTURES", 4)
    with pytest.raises(ValueError, match="114 files for 4 pictures: leave out"):
        dataset.take_in(draft, [*zips, str(texts)])


def test_files_that_are_no_pictures_are_refused(draft, tmp_path, monkeypatch):
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "a.txt").write_text("a red apple")
    with pytest.raises(ValueError, match="a.svg is neither"):
        dataset.take_in(draft, [str(tmp_path / "a.svg")])
    with pytest.raises(ValueError, match="no picture among"):
        dataset.take_in(draft, [str(tmp_path / "a.txt")])
    monkeypatch.setattr(dataset, "MOST_PICTURES", 2)
    with pytest.raises(ValueError, match="3 pictures: the studio takes 2"):
        dataset.take_in(draft, [str(p) for p in draw_pictures(tmp_path / "mine", 3).iterdir()])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (25_000, 25_000)).save(bomb)
    dataset.take_in(draft, [str(bomb)])
    report, rows, sheet = dataset.look_through(draft, 32, "name")
    assert rows == [] and sheet is None and "pixels" in report.unreadable[0][1]
