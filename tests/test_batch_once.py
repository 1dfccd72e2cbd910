"""Each picture exactly once, however a run is stopped, in every place where pictures go."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from diffusionfm.batch import plan_batch
from diffusionfm.batch.jobs import seed_of
from diffusionfm.batch.manifest import Manifest, locked
from diffusionfm.batch.stores import ShardStore
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.report import verify_shards
from diffusionfm.images import read_parameters
from tests.batch_toys import ENDS, PROMPTS, check, make, state

# ------------------------------------------------------------------ exactly once


@pytest.mark.parametrize("to", ENDS)
def test_resume_skips_heals_and_redraws_what_is_gone(tiny_pipe, tmp_path, to):
    def go(rows):
        return make(rows, tiny_pipe, tmp_path, to=to, samples_per_shard=2)

    go(PROMPTS[:4])
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob(ENDS[to])}
    last, second = sorted(before)[-1], sorted(before)[1]
    if to == "folder":
        manifest = tmp_path / "manifest.jsonl"
        manifest.write_bytes(manifest.read_bytes()[:-30])  # torn: the last was not recorded
    (tmp_path / second).unlink()
    (tmp_path / ".diffusionfm-x.tmp").write_bytes(b"half")
    summary = go(PROMPTS)
    assert (summary.made, summary.skipped) == (3, 2)
    check(tmp_path, 5)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob(ENDS[to])}
    kept = set(before) - {last, second}
    assert kept and all(after[name] == before[name] for name in kept)
    if to == "folder":
        assert after[second][0] == before[second][0]
    assert go(PROMPTS).skipped == 5
    check(tmp_path, 5)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob(ENDS[to])} == after


def test_another_run_in_the_folder_is_refused(tiny_pipe, tmp_path):
    make(PROMPTS[:1], tiny_pipe, tmp_path)
    before = state(tmp_path)
    for other in (
        {"seed": 1},
        {"steps": 2},
        {"negative_prompt": "blue"},
        {"format": "webp"},
        {"to": "parquet"},
    ):
        with pytest.raises(ValueError, match="already holds row 'row-0' with (seed|steps|neg|format|to)"):
            make(PROMPTS[:1], tiny_pipe, tmp_path, **other)
    (tmp_path / "manifest.jsonl").write_text('{"id": "row-0"}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        make(PROMPTS[:1], tiny_pipe, tmp_path)
    assert state(tmp_path) == before


@pytest.mark.parametrize("to", ENDS)
def test_a_forgotten_to_is_refused_and_no_record_is_lost(tiny_pipe, tmp_path, to, monkeypatch):
    with monkeypatch.context() as patch:  # stopped before the first shard was full
        patch.setattr(ShardStore, "close", lambda store: store.file and store.file.close())
        make(PROMPTS, tiny_pipe, tmp_path, to=to)
    if to == "folder":
        (tmp_path / "row-0.png").unlink()
    before = (tmp_path / "manifest.jsonl").read_bytes()
    for other in set(ENDS) - {to}:
        with pytest.raises(ValueError, match=f"with to '{to}', now '{other}': go on with --to {to}"):
            make(PROMPTS, tiny_pipe, tmp_path, to=other)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before
    summary = make(PROMPTS, tiny_pipe, tmp_path, to=to)
    assert (summary.made, summary.skipped) == ((1, 4) if to == "folder" else (0, 5))
    check(tmp_path, 5)


@pytest.mark.parametrize("to", ["webdataset", "parquet"])
def test_a_run_goes_on_with_smaller_shards(tiny_pipe, tmp_path, to, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "close", lambda store: store.file.close())
        make(PROMPTS[:4], tiny_pipe, tmp_path, to=to, samples_per_shard=5)
    assert make(PROMPTS, tiny_pipe, tmp_path, to=to, samples_per_shard=2).made == 1
    members = [record["member"] for record in check(tmp_path, 5)]
    assert [member[:9] for member in members] == [*(f"00000000{k}" for k in range(4)), "000010000"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cat.png", {}),
        ("report.json", {}),
        ("sheets/1.png", {}),
        ("00001.tar", {"to": "webdataset"}),
        ("00000.tar.part", {"to": "parquet"}),
        ("00000.parquet", {"to": "webdataset"}),
    ],
)
def test_a_folder_with_files_of_somebody_is_left_as_it_is(tiny_pipe, tmp_path, name, options):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    (tmp_path / "notes.txt").write_text("mine as well")
    for ask in (make, plan_batch):
        with pytest.raises(
            ValueError, match=f"holds {mine.relative_to(tmp_path).parts[0]}, which is not of a"
        ):
            ask([{"id": "cat", "prompt": "a cat"}], tiny_pipe, tmp_path, **options)
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", mine.relative_to(tmp_path).parts[0]}
    assert mine.read_text() == "mine"


def test_a_folder_with_other_files_is_fine(tiny_pipe, tmp_path):
    others = [tmp_path / name for name in ("rows.txt", "photo.jpg", "shard.tar", "2024.parquet")]
    for other in others:
        other.write_text("mine")
    assert make(PROMPTS, tiny_pipe, tmp_path, to="webdataset").made == 5
    assert make(PROMPTS, tiny_pipe, tmp_path, to="webdataset").skipped == 5
    assert {other.read_text() for other in others} == {"mine"}


def test_one_bad_row_among_a_thousand(tiny_pipe, tmp_path):
    rows = [{"id": f"{k:04d}", "prompt": f"fish {k}", "width": 32 if k != 500 else 33} for k in range(1000)]
    quick = {"steps": 1, "guidance": 1.0, "batch_size": 50, "to": "webdataset"}
    summary = make(rows, tiny_pipe, tmp_path, **quick)
    assert (summary.made, summary.failed) == (999, 1)
    failed = [r for r in check(tmp_path, 1000) if r["status"] == "failed"]
    assert [r["id"] for r in failed] == ["0500"] and "multiple of 16" in failed[0]["error"]
    rows[500]["width"] = 48
    retried = make(rows, tiny_pipe, tmp_path, retry_failed=True, **quick)
    assert (retried.made, retried.skipped, retried.failed) == (1, 999, 0)
    check(tmp_path, 1000)
    assert not verify_shards(tmp_path)


def test_second_process_is_refused(tiny_pipe, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process"):
        make(PROMPTS, tiny_pipe, tmp_path)
    assert make(PROMPTS, tiny_pipe, tmp_path).made == 5


TRIALS = """
import json, os, random, resource, shutil, signal, sys, time
import torch
torch.set_num_threads(1)  # and no other thread before the forks
from diffusionfm.batch import generate_batch
from diffusionfm.pipeline import DiffusionFMPipeline

model, home = sys.argv[1:]
pipe, dice = DiffusionFMPipeline.from_pretrained(model), random.Random(0)
rows = [{"id": f"r{k}", "prompt": f"fish {k}", "width": 32 + 16 * (k % 2)} for k in range(200)]
rows[7]["steps"] = 0
wide = [{"id": f"r{k}", "prompt": f"fish {k}", "width": 32 if k < 10 else 256} for k in range(12)]

def go(rows, out, to):
    few = {"steps": 1, "guidance": 1.0, "samples_per_shard": 7, "batch_size": 2, "sheets": 2}
    generate_batch(rows, pipe, out, to=to, progress=False, **few)

def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except OSError:
            os._exit(7)
        os._exit(0)
    return child

def lines(out):
    return open(out + "/manifest.jsonl", "rb").read().count(b"\\n") if os.path.exists(out + "/manifest.jsonl") else 0

def finished(out):
    # when the finished files on record were written; of shards those that are closed
    whole = open(out + "/manifest.jsonl").read().rpartition("\\n")[0].splitlines() if lines(out) else []
    files = {json.loads(line)["file"] for line in whole} - {None}
    return {file: os.stat(f"{out}/{file}").st_mtime_ns for file in files if os.path.exists(f"{out}/{file}")}

for to in ("folder", "webdataset", "parquet"):
    out, kept = f"{home}/kills-{to}", {}
    for kill in range(20):
        before, child, deadline = lines(out), fork(lambda: go(rows, out, to)), time.monotonic() + 60
        if kill % 2:  # at any moment: it may still read the manifest and look through the folder
            time.sleep(dice.random() * 0.4)
        else:  # soon after it has recorded something
            while lines(out) == before and time.monotonic() < deadline:
                time.sleep(0.003)
            time.sleep(dice.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        print("kill", to, os.WIFSIGNALED(os.waitpid(child, 0)[1]), lines(out), flush=True)
        kept |= {file: when for file, when in finished(out).items() if file not in kept}
    go(rows, out, to)
    touched = sum(when != finished(out)[file] for file, when in kept.items())
    print("touched", to, touched, len(kept), flush=True)

for to, limit in (("folder", 20_000), ("webdataset", 60_000), ("parquet", 60_000)):
    out = f"{home}/full-{to}"

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        go(wide, out, to)

    _, status = os.waitpid(fork(full), 0)
    print("full", to, os.waitstatus_to_exitcode(status), lines(out), flush=True)
    shutil.copy(f"{out}/manifest.jsonl", f"{home}/kept-{to}")
    go(wide, out, to)
"""


@pytest.fixture(scope="module")
def trials(tiny_model, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The folders of batches that were killed and starved, and what was said. One process forks them all."""
    home = tmp_path_factory.mktemp("trials")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", TRIALS, str(tiny_model), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return home, [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("to", ENDS)
def test_twenty_kills_and_every_picture_once(trials, to):
    home, said = trials
    kills = [line[2:] for line in said if line[:2] == ["kill", to]]
    counts = [int(count) for _, count in kills]
    assert len(kills) == 20 and counts == sorted(counts) and 0 < counts[0] < counts[-1]
    assert sum(killed == "True" for killed, _ in kills) >= 15  # the last may have been done before
    ((touched, kept),) = [line[2:] for line in said if line[:2] == ["touched", to]]
    assert touched == "0" and int(kept) > 1
    records = check(home / f"kills-{to}", 200)
    assert [path.name for path in sorted((home / f"kills-{to}" / "sheets").iterdir())] == ["1.png", "2.png"]
    assert [r["id"] for r in records if r["status"] == "failed"] == ["r7"]
    assert {(r["id"], r["seed"]) for r in records} == {(f"r{k}", seed_of(0, f"r{k}", 0)) for k in range(200)}
    if to == "webdataset":
        assert not verify_shards(home / "kills-webdataset")


@pytest.mark.parametrize("to", ENDS)
def test_a_disk_that_is_full_stops_the_run_and_loses_nothing(trials, to):
    """No write may pass a limit, as on a full disk: what was recorded stays, what was not is not there."""
    home, said = trials
    ((code, count),) = [line[2:] for line in said if line[:2] == ["full", to]]
    assert code == "7" and 0 < int(count) < 12
    records, kept = check(home / f"full-{to}", 12), (home / f"kept-{to}").read_bytes().split(b"\n")[:-1]
    assert records[: len(kept)] == [json.loads(line) for line in kept]


@pytest.mark.slow
def test_the_command_killed_and_resumed(tiny_model, tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("".join(f"a red apple {k}\n" for k in range(400)))
    command = [sys.executable, "-m", "diffusionfm.cli", "batch", str(rows), "--out", str(out)]
    command += ["--model", str(tiny_model), "--batch-size", "2", "--steps", "20", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and "another process" in second.stderr
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {r["file"] for r in Manifest(out, lambda file: True).records() if r["status"] == "ok"}
    seen = state(out)
    assert 0 < len(finished) < 400
    assert subprocess.run(command, capture_output=True).returncode == 0
    check(out, 400)
    current = state(out)
    assert all(current[name] == seen[name] for name in finished)


# ------------------------------------------------------------------ where pictures go


def test_shards_are_img2dataset_s_and_carry_everything(tiny_pipe, tmp_path):
    rows = [{"id": f"a/{k}", "prompt": f"fish {k}", "negative_prompt": "blue"} for k in range(5)]
    make(rows, tiny_pipe, tmp_path, to="webdataset", samples_per_shard=2, format="webp", size=64)
    assert {p.name for p in tmp_path.glob("0*")} == {
        f"{n:05d}{end}" for n in range(3) for end in (".tar", ".parquet", "_stats.json")
    }
    assert not verify_shards(tmp_path)
    dataset = ShardDataset(tmp_path)
    by_seed = {record["seed"]: record for record in check(tmp_path, 5)}
    for k, sample in enumerate(dataset):
        meta, record = sample["meta"], by_seed[sample["meta"]["seed"]]
        assert sample["key"] == f"{k // 2:05d}{k % 2:04d}" and sample["picture"].size == (64, 64)
        assert (meta["id"], sample["caption"], meta["sha256"]) == (
            record["id"],
            record["prompt"],
            record["sha256"],
        )
        assert meta["negative_prompt"] == "blue" and meta["model_hash"] == tiny_pipe.fingerprint()


def test_parquet_embeds_pictures_as_datasets_expects_them(tiny_pipe, tmp_path):
    make(PROMPTS, tiny_pipe, tmp_path, to="parquet", samples_per_shard=4)
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == ["00000.parquet", "00001.parquet"]
    table = pyarrow.parquet.read_table(tmp_path / "00000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and set(features) == set(table.column_names)
    row = table.to_pylist()[2]
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert image.size == (row["width"], row["height"]) == (32, 32)
    assert row["prompt"] == "a red apple 2" and row["seed"] == seed_of(0, "row-2", 0)


@pytest.mark.parametrize("to", ["webdataset", "parquet"])
def test_an_id_that_is_no_unicode_fails_alone(tiny_pipe, tmp_path, to):
    rows = [{"id": "\udfff", "prompt": "fish"}, {"id": "naïve 🦊", "prompt": "naïve 🦊"}]
    summary = make(rows, tiny_pipe, tmp_path, to=to)
    assert (summary.made, summary.failures) == (1, {"row": 1})
    assert "an id must be text in Unicode" in next(r["error"] for r in check(tmp_path, 2) if r["error"])
    again = make(rows, tiny_pipe, tmp_path, to=to)
    assert (again.made, again.skipped, again.failed) == (0, 1, 1)


def test_a_finished_shard_and_its_records_must_agree(tiny_pipe, tmp_path):
    make(PROMPTS, tiny_pipe, tmp_path, to="webdataset", samples_per_shard=5)
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines[:4]))
    with pytest.raises(ValueError, match="00000.tar holds 5 pictures, the manifest knows 4"):
        make(PROMPTS, tiny_pipe, tmp_path, to="webdataset", samples_per_shard=5)
    (tmp_path / "00000.tar").unlink()
    assert make(PROMPTS, tiny_pipe, tmp_path, to="webdataset", samples_per_shard=5).made == 5
    check(tmp_path, 5)
    (tmp_path / "00000_stats.json").unlink()  # killed between a shard and its index
    ShardStore(tmp_path, 5).resume(Manifest(tmp_path, lambda file: True).in_file)
    assert not verify_shards(tmp_path)


def test_svg_goes_to_a_folder_and_sheets_show_everything(tiny_pipe, tmp_path):
    for to in ("webdataset", "parquet"):
        with pytest.raises(ValueError, match="SVG goes to a folder"):
            make(PROMPTS, tiny_pipe, tmp_path, to=to, format="svg")
    for name, options in {
        "svg": {"format": "svg", "background": "mint"},
        "tar": {"to": "webdataset"},
        "parquet": {"to": "parquet", "format": "webp"},
    }.items():
        out = tmp_path / name
        make(PROMPTS, tiny_pipe, out, sheets=3, **options)
        assert [path.name for path in (out / "sheets").iterdir()] == ["1.png"]
        with Image.open(out / "sheets" / "1.png") as sheet:
            assert sheet.width > 5 * 96 and "/trainedAlgorithmicMedia" in sheet.info["XML:com.adobe.xmp"]
        told = read_parameters(out / "sheets" / "1.png")
        assert (told["model"], told["steps"]) == (tiny_pipe.model_name, 3) and "seed" not in told
        check(out, 5)


def test_no_metadata_leaves_nothing_in_pictures_and_sheets(tiny_pipe, tmp_path):
    make(PROMPTS[:2], tiny_pipe, tmp_path, metadata=False, sheets=1)
    files = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in files].count("1.png") == 1 and len(files) == 3
    for file in files:
        with Image.open(file) as bare:
            assert not bare.info, file
