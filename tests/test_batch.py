"""Batches: seeds, exactly once, where pictures go, what goes wrong, what is said about it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from diffusionfm.batch import generate_batch, plan_batch
from diffusionfm.batch.draw import Drawer
from diffusionfm.batch.jobs import Job, groups, seed_of
from diffusionfm.batch.manifest import Manifest, locked
from diffusionfm.batch.rows import Rows
from diffusionfm.batch.stores import ShardStore
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.report import verify_shards
from diffusionfm.formats import Finish
from diffusionfm.images import read_parameters
from diffusionfm.pipeline import DiffusionFMPipeline

PROMPTS = [{"id": f"row-{k}", "prompt": f"a red apple {k}"} for k in range(5)]
ENDS = {"folder": "*.png", "webdataset": "*.tar", "parquet": "*.parquet"}


def make(rows, pipe, out, **options):
    return generate_batch(rows, pipe, out, progress=False, **{"sheets": 0, **options})


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir() if p.suffix == ".png"}


def records_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pictures(out: Path) -> dict[str, bytes]:
    """The bytes of every finished picture by "file/member", read as a stranger would."""
    found = {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".webp", ".svg")
    }
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith((".png", ".webp"))]
            found |= {f"{path.name}/{name}": tar.extractfile(name).read() for name in names}
            assert tar.getnames() == sorted(tar.getnames(), key=lambda name: name.split(".")[0])
    for path in [] if list(out.glob("*.tar")) else out.glob("*.parquet"):
        images = pyarrow.parquet.read_table(path)["image"].to_pylist()
        found |= {f"{path.name}/{image['path']}": image["bytes"] for image in images}
    return found


def check(out: Path, count: int) -> list[dict]:
    """Each picture is there once, whole, and recorded once; nothing else is there."""
    records = records_of(out)
    assert len({(r["id"], r["repeat"]) for r in records}) == len(records) == count
    found = pictures(out)
    done = [r for r in records if r["status"] == "ok"]
    for record in done:
        name = f"{record['file']}/{record['member']}" if "member" in record else record["file"]
        assert hashlib.sha256(found.pop(name)).hexdigest() == record["sha256"]
    assert not found and not list(out.glob(".diffusionfm-*")) and not list(out.glob("*.part"))
    return records


def near(one: bytes, two: bytes) -> bool:
    a, b = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, two))
    return abs(a - b).max() <= 1


# ------------------------------------------------------------------ a picture at a time


def test_pictures_manifest_and_redraw(tiny_pipe, tmp_path):
    rows = [*PROMPTS, {"id": "own", "prompt": "fish", "seed": 9, "steps": 2, "guidance": 1.0, "width": 48}]
    summary = make(rows, tiny_pipe, tmp_path, seed=3, repeats=2, batch_size=4)
    assert (summary.made, summary.skipped, summary.failed) == (12, 0, 0)
    records = {(r["id"], r["repeat"]): r for r in check(tmp_path, 12)}
    assert records["own", 1]["seed"] == 10 and records["row-2", 1]["seed"] == seed_of(3, "row-2", 1)
    for key in (("row-2", 1), ("own", 0)):
        record = records[key]
        chosen = record["settings"]
        again = tiny_pipe(
            record["prompt"],
            seed=record["seed"],
            num_inference_steps=chosen["steps"],
            guidance_scale=chosen["guidance"],
            width=chosen["width"],
            height=chosen["height"],
        ).images[0]
        data = (tmp_path / record["file"]).read_bytes()
        assert near(data, Finish().encode(again)) and record["seconds"] > 0
        assert record["made_by"] == {
            "model": "tiny",
            "model_hash": tiny_pipe.fingerprint(),
            "lora": [],
            "lora_hashes": [],
        }
        assert read_parameters(io.BytesIO(data))["seed"] == record["seed"]


def test_pixels_agree_whatever_the_batch(tiny_pipe, tmp_path):
    for name, rows, size in (("a", PROMPTS, 5), ("b", PROMPTS[::-1], 2), ("c", PROMPTS[2:4], 1)):
        make(rows, tiny_pipe, tmp_path / name, batch_size=size)
    all_at_once = pictures(tmp_path / "a")
    for other in ("b", "c"):
        for name, data in pictures(tmp_path / other).items():
            assert near(data, all_at_once[name])
            assert read_parameters(io.BytesIO(data)) == read_parameters(io.BytesIO(all_at_once[name]))


def test_deterministic_bytes_know_no_company(tiny_pipe, tmp_path):
    mixed = [*PROMPTS, {"id": "wide", "prompt": "fish", "width": 64}]
    make(mixed, tiny_pipe, tmp_path / "a", deterministic=True, batch_size=8)
    make(mixed[::-1], tiny_pipe, tmp_path / "b", deterministic=True, batch_size=3)
    make(mixed, tiny_pipe, tmp_path / "c", deterministic=True, only=["row-3"])
    everything = pictures(tmp_path / "a")
    assert pictures(tmp_path / "b") == everything and len(everything) == 6
    assert pictures(tmp_path / "c") == {"row-3.png": everything["row-3.png"]}
    record = next(r for r in records_of(tmp_path / "a") if r["id"] == "row-3")
    image = tiny_pipe(record["prompt"], seed=record["seed"]).images[0]
    said = tiny_pipe.describe(record["prompt"], record["seed"], record["settings"])
    assert Finish().encode(image, said) == everything["row-3.png"]


def test_a_lora_is_on_record_and_changes_the_run(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    network = inject_adapter_in_model(config, pipe.transformer, adapter_name="made")
    config.save_pretrained(tmp_path / "style")
    weights = get_peft_model_state_dict(network, adapter_name="made")
    file = tmp_path / "style" / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}, file)

    def adapted(scale: float) -> DiffusionFMPipeline:
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
        pipe.load_lora(tmp_path / "style", scale)
        return pipe

    make(PROMPTS[:1], adapted(0.5), tmp_path / "out")
    (record,) = check(tmp_path / "out", 1)
    assert record["made_by"]["lora"] == ["style:0.5"]
    assert record["made_by"]["lora_hashes"] == [hashlib.sha256(file.read_bytes()).hexdigest()[:12]]
    assert read_parameters(tmp_path / "out" / record["file"])["lora"] == ["style:0.5"]
    with pytest.raises(ValueError, match=r"with lora \['style:0.5'\], now \['style:0.8'\]"):
        make(PROMPTS[:1], adapted(0.8), tmp_path / "out")


def test_only_some_rows(tiny_pipe, tmp_path):
    rows = Rows(["fish", "fish", *PROMPTS])
    second = list(rows)[1].id
    assert make(rows, tiny_pipe, tmp_path, only=[second, "row-1"]).made == 2
    assert {record["id"] for record in check(tmp_path, 2)} == {second, "row-1"}
    with pytest.raises(ValueError, match="no row has the id 'row-9'"):
        make(rows, tiny_pipe, tmp_path, only=["row-1", "row-9"])
    assert make(rows, tiny_pipe, tmp_path).made == 5


def test_prompts_are_encoded_once(tiny_pipe, tmp_path, monkeypatch):
    told = []
    encode = tiny_pipe.text_encoder.forward
    monkeypatch.setattr(
        tiny_pipe.text_encoder, "forward", lambda *args, **kw: told.append(1) or encode(*args, **kw)
    )
    rows = [{"id": str(k), "prompt": ("fish", "cat")[k % 2]} for k in range(6)]
    make(rows, tiny_pipe, tmp_path, batch_size=2, repeats=2)
    assert len(told) == 3  # fish, cat and the empty negative prompt, over six network calls


def test_jobs_of_one_shape_share_a_call_within_a_window():
    def job(k: int, width: int, error: str | None = None) -> Job:
        return Job(str(k), 0, "x", k, {"steps": 1, "guidance": 1.0, "width": width, "height": 32}, error)

    mixed = [job(k, 32 + 16 * (k % 3)) for k in range(30)]
    found = list(groups(mixed, lambda shape: 4))
    assert sorted(len(group) for group in found) == [2] * 3 + [4] * 6
    assert all(len({job.shape for job in group}) == 1 for group in found)
    found = list(groups(mixed, lambda shape: 64, window=7))
    assert sum(map(len, found)) == 30 and max(map(len, found)) == 4  # the largest goes when seven wait
    found = list(groups([job(0, 32), job(1, 32, "bad"), job(2, 32)], lambda shape: 4))
    assert [[job.seed for job in group] for group in found] == [[1], [0, 2]]


def test_the_size_of_a_call_follows_the_memory(tiny_pipe, monkeypatch):
    from diffusionfm.batch import fit

    small, large = (fit.picture_bytes(tiny_pipe, side, side, 2) for side in (64, 256))
    assert 12 < large / small < 20
    assert fit.picture_bytes(tiny_pipe, 64, 64, 1) <= small
    monkeypatch.setattr(fit, "free_bytes", lambda device: 2 * 3 * large)
    drawer = Drawer(tiny_pipe)
    assert drawer.size((3, 3.0, 256, 256)) == 3 and drawer.size((3, 3.0, 1024, 1024)) == 1
    assert drawer.size((3, 3.0, 64, 64)) == drawer.size((9, 3.0, 64, 64)) == fit.MOST["cpu"]
    assert Drawer(tiny_pipe, 5).size((3, 3.0, 1024, 1024)) == 5


def test_a_call_out_of_memory_is_halved(tiny_pipe, tmp_path, monkeypatch):
    import torch

    calls, decode = [], tiny_pipe.vae.decode

    def tight(latents):
        calls.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(tiny_pipe.vae, "decode", tight)
    rows = [{"id": str(k), "prompt": f"fish {k}"} for k in range(12)]
    assert make(rows, tiny_pipe, tmp_path, batch_size=8).made == 12
    assert calls[:3] == [8, 4, 2] and 8 not in calls[1:]
    check(tmp_path, 12)


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


def test_bad_rows_fail_alone(tiny_pipe, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = '{"id": "good", "prompt": "fish"}\n'
    bad = ['{"prompt": ', '{"id": "e", "prompt": " "}', '{"id": "s", "prompt": "x", "steps": 0}', "[1]"]
    bad += [
        '{"id": "t", "prompt": 5}',
        '{"id": "u", "prompt": "x", "size": 3}',
        '{"id": "v", "prompt": "\\ud800"}',
    ]
    bad += ['{"id": "n", "prompt": "x", "guidance": NaN}', '{"id": "\\udfff", "prompt": "x", "seed": -1}']
    bad += [json.dumps({"id": "m", "prompt": "a" * 2**20, "negative_prompt": "b" * 2**20})]
    file.write_text(good + "\n".join(bad) + "\n")
    out = tmp_path / "out"
    summary = make(file, tiny_pipe, out)
    assert (summary.made, summary.failed, summary.failures) == (1, 10, {"row": 10})
    records = {r["id"]: r for r in check(out, 11)}
    assert "not JSON" in records["line-2"]["error"] and "steps must be" in records["s"]["error"]
    assert (out / "manifest.jsonl").stat().st_size < 20_000 and "NaN" not in (
        out / "manifest.jsonl"
    ).read_text()
    again = make(file, tiny_pipe, out)
    assert (again.made, again.skipped, again.failed) == (0, 11, 10)
    file.write_text(file.read_text().replace('"steps": 0', '"steps": 1'))
    assert make(file, tiny_pipe, out).made == 0
    fixed = make(file, tiny_pipe, out, retry_failed=True)
    assert (fixed.made, fixed.failed) == (1, 9)
    check(out, 11)


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
import os, random, resource, shutil, signal, sys, time
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
    few = {"steps": 1, "guidance": 1.0, "samples_per_shard": 7, "batch_size": 2, "sheets": 0}
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

for to in ("folder", "webdataset", "parquet"):
    out = f"{home}/kills-{to}"
    for kill in range(20):
        before, child, deadline = lines(out), fork(lambda: go(rows, out, to)), time.monotonic() + 60
        while lines(out) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        print("kill", to, os.WIFSIGNALED(os.waitpid(child, 0)[1]), lines(out), flush=True)
    go(rows, out, to)

for to, limit in (("folder", 20_000), ("webdataset", 60_000)):
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
    records = check(home / f"kills-{to}", 200)
    assert [r["id"] for r in records if r["status"] == "failed"] == ["r7"]
    assert {(r["id"], r["seed"]) for r in records} == {(f"r{k}", seed_of(0, f"r{k}", 0)) for k in range(200)}
    if to == "webdataset":
        assert not verify_shards(home / "kills-webdataset")


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_a_disk_that_is_full_stops_the_run_and_loses_nothing(trials, to):
    """No write may pass a limit, as on a full disk: what was recorded stays, what was not is not there."""
    home, said = trials
    ((code, count),) = [line[2:] for line in said if line[:2] == ["full", to]]
    assert code == "7" and 0 < int(count) < 12
    records, kept = check(home / f"full-{to}", 12), (home / f"kept-{to}").read_bytes().split(b"\n")[:-1]
    assert records[: len(kept)] == [json.loads(line) for line in kept]


def test_the_command_killed_and_resumed(tiny_model, tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("".join(f"a red apple {k}\n" for k in range(40)))
    command = [sys.executable, "-m", "diffusionfm.cli", "batch", str(rows), "--out", str(out)]
    command += ["--model", str(tiny_model), "--batch-size", "2", "--steps", "20", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {r["file"] for r in Manifest(out, lambda file: True).records() if r["status"] == "ok"}
    seen = state(out)
    assert 0 < len(finished) < 40
    assert subprocess.run(command, capture_output=True).returncode == 0
    check(out, 40)
    current = state(out)
    assert all(current[name] == seen[name] for name in finished)


def test_a_folder_that_cannot_be_written_is_refused(tiny_pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        make(PROMPTS, tiny_pipe, tmp_path / "file")
    locked_away = tmp_path / "read-only"
    locked_away.mkdir(mode=0o555)
    out = locked_away if os.geteuid() else Path("/sys/kernel")  # root may write anywhere but there
    with pytest.raises(OSError):
        make(PROMPTS, tiny_pipe, out / "out")


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
            assert sheet.width > 5 * 96
        check(out, 5)


# ------------------------------------------------------------------ plan and report


def test_the_plan_counts_and_writes_nothing(tiny_pipe, tmp_path):
    rows = [*PROMPTS, {"id": "m", "prompt": "{red|blue} cat", "width": 64}, {"id": "bad", "prompt": ""}]
    make(PROMPTS[:2], tiny_pipe, tmp_path, repeats=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    plan = plan_batch(rows, tiny_pipe, tmp_path, repeats=2)
    assert (plan.rows, plan.pictures, plan.done, plan.broken, plan.shapes.total()) == (8, 16, 4, 2, 10)
    assert plan.seconds > 0 and plan.report()["shapes"][0] == {
        "steps": 3,
        "guidance": 3.0,
        "width": 32,
        "height": 32,
        "pictures": 6,
    }
    assert "10 to make, 4 already there" in plan.text() and "bad: the prompt is empty" in plan.text()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert plan_batch([{"prompt": ""}], tiny_pipe, tmp_path / "none").seconds is None
    assert not (tmp_path / "none").exists()


def test_the_report_tells_speed_memory_and_failures(tiny_pipe, tmp_path):
    summary = generate_batch(
        [*PROMPTS, {"id": "bad", "prompt": ""}],
        tiny_pipe,
        tmp_path,
        load_seconds=1.5,
        sheets=0,
        progress=False,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == summary.report() and report["failures"] == {"row": 1} and report["load_seconds"] == 1.5
    assert report["pictures_per_second"] > 0 and report["peak_memory"] > 2**25
    latency = report["latency_seconds"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= summary.seconds
    assert "5 made, 0 already there, 1 failed" in summary.text() and "1 row" in summary.text()
    again = make([*PROMPTS, {"id": "bad", "prompt": ""}], tiny_pipe, tmp_path)
    assert again.failures == {"row": 1} and again.report()["pictures_per_second"] is None


def test_the_manifest_is_small_in_memory(tmp_path):
    record = {"prompt": "fish", "seed": 1, "status": "ok", "kind": None, "file": "x.png", "settings": {}}
    record |= {"output": {}, "made_by": {}, "repeat": 0}

    def kept(count: int) -> tuple[Manifest, int]:
        with (tmp_path / "manifest.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": f"row {k}", **record}) + "\n" for k in range(count))
        tracemalloc.start()
        try:
            return Manifest(tmp_path, lambda file: True), tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    (_, few), (manifest, many) = kept(1000), kept(5000)
    assert (many - few) / 4000 < 40  # bytes a record
    assert (
        manifest.state(Job("row 4999", 0, "", 0)) == 0 and manifest.state(Job("row 5000", 0, "", 0)) is None
    )
