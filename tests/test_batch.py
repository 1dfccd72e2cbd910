"""Batches: seeds and company, calls that fit, rows that are bad, the plan and the report."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionfm.batch import draw, generate_batch, plan, plan_batch, report
from diffusionfm.batch.draw import Drawer, Drawn
from diffusionfm.batch.jobs import Job, groups, seed_of
from diffusionfm.batch.manifest import Manifest
from diffusionfm.batch.options import Options
from diffusionfm.batch.rows import Rows
from diffusionfm.batch.run import AHEAD
from diffusionfm.batch.stores import FolderStore
from diffusionfm.formats import Finish
from diffusionfm.images import TEMPORARY, contact_sheet, read_parameters, save_png
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.unet import DiffusionUNet
from tests.batch_toys import PROMPTS, check, make, near, pictures, records_of

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


def make_lora(pipe: DiffusionFMPipeline, folder: Path) -> Path:
    """The file of a small LoRA made for the pipeline, which then wears it."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    network = inject_adapter_in_model(config, pipe.transformer, adapter_name="made")
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(network, adapter_name="made")
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}, file)
    return file


def test_a_lora_is_on_record_and_changes_the_run(tiny_model, tmp_path):
    file = make_lora(DiffusionFMPipeline.from_pretrained(tiny_model), tmp_path / "style")

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
    sizes = iter([8] * 7 + [2] * 9)  # memory ran short while the eighth was waited for
    found = list(groups([job(k, 32) for k in range(8)], lambda shape: next(sizes)))
    assert [len(group) for group in found] == [2] * 4
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
    assert Drawer(tiny_pipe, sharing=3).size((3, 3.0, 256, 256)) == 1  # three workers on this machine


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


def broken_device(monkeypatch, is_dead: bool) -> None:
    """Calls with any picture from the seventh on fail as a CUDA device does after an illegal access."""
    call = Drawer._call

    def failing(drawer, jobs):
        if any(int(job.id) >= 6 for job in jobs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return call(drawer, jobs)

    monkeypatch.setattr(Drawer, "_call", failing)
    if is_dead:
        monkeypatch.setattr("diffusionfm.batch.draw.answers", lambda device: False)


def test_a_device_that_draws_no_more_stops_the_run(tiny_pipe, tmp_path, monkeypatch):
    rows = [{"id": str(k), "prompt": f"fish {k}"} for k in range(20)]
    with monkeypatch.context() as patch:
        broken_device(patch, is_dead=True)
        with pytest.raises(
            OSError, match="the device has stopped working \\(CUDA error: an illegal memory access"
        ):
            make(rows, tiny_pipe, tmp_path, batch_size=2)
    assert [(r["id"], r["status"]) for r in records_of(tmp_path)] == [(str(k), "ok") for k in range(6)]
    assert make(rows, tiny_pipe, tmp_path, batch_size=2).made == 14
    check(tmp_path, 20)


def test_pictures_that_a_sound_device_fails_at_are_recorded(tiny_pipe, tmp_path, monkeypatch):
    broken_device(monkeypatch, is_dead=False)
    rows = [{"id": str(k), "prompt": f"fish {k}"} for k in range(20)]
    summary = make(rows, tiny_pipe, tmp_path, batch_size=2)
    assert (summary.made, summary.failures) == (6, {"drawing": 14})
    check(tmp_path, 20)


def test_a_group_that_kills_its_worker_is_halved_and_one_picture_fails(tiny_pipe, tmp_path, monkeypatch):
    from diffusionfm import ray_jobs

    def dying(work, items, workers, lost):
        for group in items:
            waiting = [group]
            while waiting:
                group = waiting.pop(0)
                if any(job.id == "3" for job in group):
                    smaller, results = lost(group, "a worker died 4 times over one item: out of memory?")
                    waiting += smaller
                    yield from results
                else:
                    yield work(group)

    monkeypatch.setattr(ray_jobs, "each", dying)
    rows = [{"id": str(k), "prompt": f"fish {k}"} for k in range(12)]
    summary = make(rows, tiny_pipe, tmp_path, engine="ray", batch_size=8)
    assert (summary.made, summary.failures) == (11, {"memory": 1})
    (failed,) = (r for r in check(tmp_path, 12) if r["status"] == "failed")
    assert (failed["id"], failed["error"]) == ("3", "a worker died 4 times over one item: out of memory?")


def test_what_a_ray_cluster_fails_at_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray")
    from diffusionfm import ray_jobs

    def outcome(error, lost=None):
        def get(done):
            raise error

        monkeypatch.setattr(ray, "get", get)
        return ray_jobs._outcome("done", [1, 2], lost)

    for error, why in (
        (ray.exceptions.WorkerCrashedError(), "a worker died 4 times over one item"),
        (ray.exceptions.OutOfMemoryError("memory\nmonitor"), "a worker ran out of memory over one item"),
    ):
        with pytest.raises(ValueError, match=why):
            outcome(error)
        assert outcome(error, lambda item, why: ([item[:1], item[1:]], [why]))[0] == [[1], [2]]
    with pytest.raises(ValueError, match="the Ray cluster failed .*: see to it, then run the same") as told:
        outcome(ray.exceptions.NodeDiedError("node gone\nsee the logs"), lambda item, why: ([], []))
    assert "\n" not in str(told.value)


def worker_recipe(pipe, **options):
    """A recipe as a worker gets it."""
    chosen = Options(engine="ray", **options)
    draw._load.cache_clear()
    return chosen.recipe(pipe, chosen.run(pipe))


def test_a_worker_s_kernels_are_the_same_each_time_if_so_asked(tiny_pipe, monkeypatch):
    import torch

    seen = []
    monkeypatch.setattr(Drawer, "draw", lambda *_: seen.append(torch.backends.cudnn.deterministic) or [])
    for deterministic in (True, False):
        draw.draw_remotely(worker_recipe(tiny_pipe, deterministic=deterministic), [])
    assert seen == [True, False] and not torch.backends.cudnn.deterministic


def test_a_worker_with_another_lora_is_refused(tiny_model, tmp_path):
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    file = make_lora(pipe, tmp_path / "style")
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    pipe.load_lora(tmp_path / "style", 0.5)
    how = worker_recipe(pipe)
    job = Job("a", 0, "fish", 1, {"negative_prompt": "", **pipe.settings(steps=1)})
    (drawn,) = draw.draw_remotely(how, [job])
    assert read_parameters(io.BytesIO(drawn.data))["lora"] == ["style:0.5"]
    weights = load_file(file)
    save_file({name: value * 2 for name, value in weights.items()}, file)  # as it is on the worker's machine
    draw._load.cache_clear()
    with pytest.raises(ValueError, match="style is another LoRA on this machine: copy the same to all"):
        draw.draw_remotely(how, [job])


def test_pictures_are_drawn_while_others_are_written_and_few_are_held(tiny_pipe, tmp_path, monkeypatch):
    """The first group is written once AHEAD more are drawn, and no further one is; at no time are all jobs there."""
    drawn, ahead, seen, held, alive = [], threading.Event(), [], [], []
    draw, put = Drawer.draw, FolderStore.put

    def counted(drawer, group):
        alive.extend(weakref.ref(job) for job in group)
        drawn.append(len(group))
        if len(drawn) == AHEAD + 1:
            ahead.set()
        return draw(drawer, group)

    def waiting(store, samples):
        assert ahead.wait(60), "nothing is drawn while the first pictures are written"
        seen.append(len(drawn))
        held.append(sum(job() is not None for job in alive))
        return put(store, samples)

    monkeypatch.setattr(Drawer, "draw", counted)
    monkeypatch.setattr(FolderStore, "put", waiting)
    rows = ({"id": str(k), "prompt": "fish"} for k in range(120))
    assert make(rows, tiny_pipe, tmp_path, batch_size=4, steps=1, guidance=1.0).made == 120
    assert seen[0] == AHEAD + 1 and len(seen) == len(drawn) == 30
    assert max(held) <= 4 * (AHEAD + 2)
    check(tmp_path, 120)


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
    (line,) = (id for id in records if id.startswith("line-2-"))
    assert "not JSON" in records[line]["error"] and "steps must be" in records["s"]["error"]
    assert (out / "manifest.jsonl").stat().st_size < 20_000 and "NaN" not in (
        out / "manifest.jsonl"
    ).read_text()
    again = make(file, tiny_pipe, out)
    assert (again.made, again.skipped, again.failed) == (0, 1, 10)
    file.write_text(file.read_text().replace('"steps": 0', '"steps": 1'))
    assert make(file, tiny_pipe, out).made == 0
    fixed = make(file, tiny_pipe, out, retry_failed=True)
    assert (fixed.made, fixed.failed) == (1, 9)
    check(out, 11)


def test_a_mended_line_s_failure_is_forgotten_when_failures_are_tried_again(tiny_pipe, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text('{"id": "a", "prompt": "fish"}\n{"id": "b"\n{"prompt": "cat", "steps": 0}\n[]\n')
    assert make(file, tiny_pipe, out).failed == 3
    file.write_text('{"id": "a", "prompt": "fish"}\n{"id": "b", "prompt": "x"}\n{"prompt": "cat"}\n[]\n')
    one = make(file, tiny_pipe, out, retry_failed=True, only=["b"])
    assert (one.made, one.failures) == (1, {"row": 3})  # the other rows were not looked at
    all_of_them = make(file, tiny_pipe, out, retry_failed=True)
    assert (all_of_them.made, all_of_them.failed, all_of_them.failures) == (1, 1, {"row": 1})
    assert json.loads((out / "report.json").read_text())["failures"] == {"row": 1}
    check(out, 4)


def test_a_size_that_the_denoiser_does_not_take_fails_alone(tiny_pipe, tmp_path):
    sizes = {"in_channels": 4, "widths": [32, 32, 32], "blocks": 1, "heads": 2, "grid": 4}
    unet = DiffusionUNet(**sizes, text_dim=16, text_width=16, condition_dim=16)
    pipe = DiffusionFMPipeline(**tiny_pipe.components | {"transformer": unet})
    pipe.defaults = dict(tiny_pipe.defaults)
    rows = [{"id": "odd", "prompt": "fish", "width": 48}, {"id": "good", "prompt": "fish"}]
    summary = make(rows, pipe, tmp_path)
    assert (summary.made, summary.failures) == (1, {"row": 1})
    assert ["does not halve" in str(record["error"]) for record in check(tmp_path, 2)] == [True, False]


def test_a_folder_that_cannot_be_written_is_refused(tiny_pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        make(PROMPTS, tiny_pipe, tmp_path / "file")
    locked_away = tmp_path / "read-only"
    locked_away.mkdir(mode=0o555)
    out = locked_away if os.geteuid() else Path("/sys/kernel")  # root may write anywhere but there
    with pytest.raises(OSError, match="Permission|not permitted|No such file|Read-only"):
        make(PROMPTS, tiny_pipe, out / "out")


# ------------------------------------------------------------------ plan and report


def test_the_plan_counts_and_writes_nothing(tiny_pipe, tmp_path):
    rows = [*PROMPTS, {"id": "m", "prompt": "{red|blue} cat", "width": 64}, {"id": "bad", "prompt": ""}]
    make(PROMPTS[:2], tiny_pipe, tmp_path, repeats=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    found = plan_batch(rows, tiny_pipe, tmp_path, repeats=2)
    assert (found.rows, found.pictures, found.done, found.broken, found.shapes.total()) == (8, 16, 4, 2, 10)
    assert found.seconds > 0 and found.report()["shapes"][0] == {
        "steps": 3,
        "guidance": 3.0,
        "width": 32,
        "height": 32,
        "pictures": 6,
    }
    assert "10 to make, 4 already there" in found.text() and "2 pictures cannot be drawn" in found.text()
    assert found.text().count("bad: the prompt is empty") == 1
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert plan_batch([{"prompt": ""}], tiny_pipe, tmp_path / "none").seconds is None
    assert not (tmp_path / "none").exists()


def test_the_estimate_counts_ray_s_workers(tiny_pipe, tmp_path, monkeypatch):
    import torch

    clock = [0.0]

    def drawing(jobs):
        clock[0] += 1 + jobs[0].settings["steps"]
        return [Drawn(job) for job in jobs]

    drawer = SimpleNamespace(
        pipe=SimpleNamespace(scale=lambda *_: 1), size=lambda shape: 2, draw=drawing, words={}
    )
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for workers, seconds in ((1, 44), (4, 11)):
        found = plan.Plan(8, shapes=Counter({(10, 3.0, 32, 32): 8}))
        found.estimate(drawer, workers)
        assert found.seconds == seconds and found.report()["workers"] == workers
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    asked = [Options(), *(Options(engine="ray", workers=workers) for workers in (0, 2, 20))]
    assert [options.processes(tiny_pipe) for options in asked] == [(1, 1), (8, 8), (2, 2), (8, 8)]
    monkeypatch.setenv("RAY_ADDRESS", "there")
    assert asked[3].processes(tiny_pipe) == (20, 8)
    seen, trial, own = [], Drawer.draw, torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(Drawer, "draw", lambda *a: seen.append(torch.get_num_threads()) or trial(*a))
    said = plan_batch(PROMPTS, tiny_pipe, tmp_path / "out", engine="ray", workers=20, steps=1).text()
    assert "on 20 workers as fast as one here" in said and set(seen) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(own)


def test_a_sheet_holds_its_pictures_small(tmp_path, monkeypatch):
    pictures = [Image.radial_gradient("L").convert("RGBA").resize((400 + k, 300 - k)) for k in range(3)]
    records = []
    for k, picture in enumerate(pictures):
        save_png(picture, tmp_path / f"{k}.png")
        records.append({"status": "ok", "file": f"{k}.png", "prompt": f"fish {k}"})
    seen = []

    def watched(images, *more, **options):
        seen.extend(max(image.size) for image in images)
        return contact_sheet(images, *more, **options)

    monkeypatch.setattr(report, "contact_sheet", watched)
    (sheet,) = report.write_sheets(tmp_path, records, 1, None)
    whole = contact_sheet(pictures, [r["prompt"] for r in records], columns=3, cell=96)
    with Image.open(sheet) as found:
        assert found.tobytes() == whole.tobytes()
    assert seen == [96] * 3


def test_sheets_that_a_kill_left_unfinished_are_made_when_it_is_run_again(tiny_pipe, tmp_path):
    few = {"steps": 1, "guidance": 1.0, "sheets": 2}
    make([f"fish {k}" for k in range(101)], tiny_pipe, tmp_path, **few)
    first, second = (tmp_path / "sheets" / f"{k}.png" for k in (1, 2))
    kept = [path.read_bytes() for path in (first, second)]
    half = first.with_name(f"{TEMPORARY}half.tmp")
    half.write_bytes(kept[0][:100])  # killed while the first, which comes last, was written anew
    first.write_bytes(b"of a run before")
    os.utime(first, ns=(0, 0))
    second.unlink()
    assert make([f"fish {k}" for k in range(101)], tiny_pipe, tmp_path, **few).made == 0
    assert [path.read_bytes() for path in (first, second)] == kept and not half.exists()
    when = first.stat().st_mtime_ns
    assert make([f"fish {k}" for k in range(101)], tiny_pipe, tmp_path, **few).made == 0
    assert first.stat().st_mtime_ns == when


def test_the_report_tells_speed_memory_and_failures(tiny_pipe, tmp_path):
    summary = generate_batch(
        [*PROMPTS, {"id": "bad", "prompt": ""}],
        tiny_pipe,
        tmp_path,
        load_seconds=1.5,
        sheets=0,
        progress=False,
    )
    told = json.loads((tmp_path / "report.json").read_text())
    assert told == summary.report() and told["failures"] == {"row": 1} and told["load_seconds"] == 1.5
    assert told["pictures_per_second"] > 0 and told["peak_memory"] > 2**25
    latency = told["latency_seconds"]
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
        manifest = Manifest(tmp_path, lambda file: True)
        held = (
            value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(value)
            for value in vars(manifest).values()
        )
        return manifest, sum(held)

    (_, few), (manifest, many) = kept(1000), kept(5000)
    assert 10 < (many - few) / 4000 < 40  # bytes a record
    assert (
        manifest.state(Job("row 4999", 0, "", 0)) == 0 and manifest.state(Job("row 5000", 0, "", 0)) is None
    )
