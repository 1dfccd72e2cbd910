"""Batches: rows, seeds, exactly once, what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionfm.batch import generate_batch
from diffusionfm.batch.jobs import seed_of
from diffusionfm.batch.manifest import Manifest, locked
from diffusionfm.batch.rows import Rows, file_stem
from diffusionfm.images import read_parameters


def read_rows(source):
    return list(Rows(source))


PROMPTS = [{"id": f"row-{k}", "prompt": f"a red apple {k}"} for k in range(5)]


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir() if p.suffix == ".png"}


def check_manifest(out: Path, count: int) -> list[dict]:
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({(r["id"], r["repeat"]) for r in records}) == len(records) == count
    for record in records:
        if record["status"] == "ok":
            assert hashlib.sha256((out / record["file"]).read_bytes()).hexdigest() == record["sha256"]
    assert {p.name for p in out.glob("*.png")} == {r["file"] for r in records if r["status"] == "ok"}
    assert not list(out.glob(".diffusionfm-*"))
    return records


# ------------------------------------------------------------------ rows


def test_formats_agree(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"id": "x", "prompt": "a, b", "seed": 5}\n\n{"prompt": "c", "guidance": 2.5}\n'
    )
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,prompt,seed,guidance\r\nx,"a, b",5,\r\n,c,,2.5\r\n')
    (tmp_path / "a.tsv").write_text("id\tprompt\tseed\tguidance\nx\ta, b\t5\t\n\tc\t\t2.5\n")
    rows = read_rows(tmp_path / "a.jsonl")
    assert rows == read_rows(tmp_path / "a.csv") == read_rows(tmp_path / "a.tsv")
    assert (rows[0].id, rows[0].seed, rows[1].guidance) == ("x", 5, 2.5)
    (tmp_path / "a.txt").write_text("a red apple\n\nnaïve fish\na red apple\n", encoding="utf-8")
    first, second, third = read_rows(tmp_path / "a.txt")
    assert first.prompt == third.prompt and third.id == first.id + "-2" and second.prompt == "naïve fish"
    assert read_rows(["naïve fish", "a red apple"])[1].id == first.id  # an id does not depend on the order
    (tmp_path / "b.csv").write_text('prompt\n"two\nlines, ""quoted"""\n')
    assert read_rows(tmp_path / "b.csv")[0].prompt == 'two\nlines, "quoted"'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "holds no prompt"),
        ("a.xlsx", "x", "cannot tell the format"),
        ("a.csv", "prompt,stpes\nx,3\n", "unknown column 'stpes': did you mean steps"),
        ("a.csv", "id\nx\n", "no column named prompt"),
        ("a.csv", 'prompt\n"open\n', "check its quotes"),
        (
            "a.jsonl",
            '{"id": "x", "prompt": "a"}\n{"id": "X", "prompt": "b"}\n',
            "rows 1 and 2 have the same id",
        ),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "none.txt")


def test_file_names_are_safe_and_distinct():
    ids = ["a", "a/b", "../../etc/passwd", "a b", "a-b", ".hidden", "x" * 300, "苹果", "a~1", "CON", ""]
    stems = [file_stem(i, r) for i in ids for r in (0, 1)]
    assert len(set(stems)) == len(stems)
    assert not any("/" in s or s.startswith(".") or len(s) > 120 for s in stems)


# ------------------------------------------------------------------ generating


def test_pictures_manifest_and_redraw(tiny_pipe, tmp_path):
    rows = [*PROMPTS, {"id": "own", "prompt": "fish", "seed": 9, "steps": 2, "guidance": 1.0, "width": 48}]
    summary = generate_batch(rows, tiny_pipe, tmp_path, seed=3, repeats=2, batch_size=4, progress=False)
    assert (summary.made, summary.skipped, summary.failed) == (12, 0, 0)
    records = {(r["id"], r["repeat"]): r for r in check_manifest(tmp_path, 12)}
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
        with Image.open(tmp_path / record["file"]) as image:
            assert abs(np.asarray(image).astype(int) - np.asarray(again)).max() <= 1
        assert read_parameters(tmp_path / record["file"])["seed"] == record["seed"]


def test_seed_ignores_order_and_batch_size(tiny_pipe, tmp_path):
    generate_batch(PROMPTS, tiny_pipe, tmp_path / "a", batch_size=5, progress=False)
    generate_batch(PROMPTS[::-1], tiny_pipe, tmp_path / "b", batch_size=2, progress=False)
    for file in (tmp_path / "a").glob("*.png"):
        with Image.open(file) as one, Image.open(tmp_path / "b" / file.name) as two:
            assert abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1
            assert one.info["diffusionfm"] == two.info["diffusionfm"]


def test_resume_skips_heals_and_redraws_what_is_gone(tiny_pipe, tmp_path):
    generate_batch(PROMPTS[:4], tiny_pipe, tmp_path, progress=False)
    before = state(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-30])  # torn: row-3 was not recorded
    (tmp_path / "row-1.png").unlink()
    (tmp_path / ".diffusionfm-x.tmp").write_bytes(b"half")
    summary = generate_batch(PROMPTS, tiny_pipe, tmp_path, progress=False)
    assert (summary.made, summary.skipped) == (3, 2)
    check_manifest(tmp_path, 5)
    after = state(tmp_path)
    assert after["row-0.png"] == before["row-0.png"] and after["row-2.png"] == before["row-2.png"]
    assert after["row-1.png"][0] == before["row-1.png"][0]
    assert generate_batch(PROMPTS, tiny_pipe, tmp_path, progress=False).skipped == 5
    assert state(tmp_path) == after


def test_another_run_in_the_folder_is_refused(tiny_pipe, tmp_path):
    generate_batch(PROMPTS[:1], tiny_pipe, tmp_path, progress=False)
    before = state(tmp_path)
    for other in ({"seed": 1}, {"steps": 2}, {"negative_prompt": "blue"}):
        with pytest.raises(ValueError, match="already holds row 'row-0'"):
            generate_batch(PROMPTS[:1], tiny_pipe, tmp_path, progress=False, **other)
    (tmp_path / "manifest.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        generate_batch(PROMPTS[:1], tiny_pipe, tmp_path, progress=False)
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
    file.write_text(good + "\n".join(bad) + "\n")
    out = tmp_path / "out"
    summary = generate_batch(file, tiny_pipe, out, progress=False)
    assert (summary.made, summary.failed) == (1, 7)
    records = {r["id"]: r for r in check_manifest(out, 8)}
    assert "not JSON" in records["line-2"]["error"] and "steps must be" in records["s"]["error"]
    again = generate_batch(file, tiny_pipe, out, progress=False)
    assert (again.made, again.skipped, again.failed) == (0, 8, 7)
    file.write_text(file.read_text().replace('"steps": 0', '"steps": 1'))
    assert generate_batch(file, tiny_pipe, out, progress=False).made == 0
    fixed = generate_batch(file, tiny_pipe, out, retry_failed=True, progress=False)
    assert (fixed.made, fixed.failed) == (1, 6)
    check_manifest(out, 8)


def test_second_process_is_refused(tiny_pipe, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process"):
        generate_batch(PROMPTS, tiny_pipe, tmp_path, progress=False)
    assert generate_batch(PROMPTS, tiny_pipe, tmp_path, progress=False).made == 5


def test_killed_and_resumed(tiny_model, tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("".join(f"a red apple {k}\n" for k in range(40)))
    command = [
        sys.executable,
        "-m",
        "diffusionfm.cli",
        "batch",
        str(rows),
        "--out",
        str(out),
        "--model",
        str(tiny_model),
    ]
    command += ["--batch-size", "2", "--steps", "20", "--device", "cpu"]
    made, seen = 0, {}
    for more in (3, 5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and len(list(out.glob("*.png"))) < made + more
        ):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        finished = {r["file"] for r in Manifest(out, lambda file: True).records() if r["status"] == "ok"}
        current = state(out)
        assert all(current[name] == seen[name] for name in seen)
        seen = {name: current[name] for name in finished}
        made = len(finished)
        assert 0 < made < 40
    assert subprocess.run(command, capture_output=True).returncode == 0
    check_manifest(out, 40)
    current = state(out)
    assert all(current[name] == seen[name] for name in seen)
