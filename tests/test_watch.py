"""Looks at runs from outside while they go on: half-written lines count for nothing."""

from __future__ import annotations

import json

from diffusionfm.batch.manifest import MANIFEST
from diffusionfm.batch.watch import Look, look


def test_a_batch_under_way(tmp_path):
    assert look(tmp_path / "nowhere") == Look()
    records = [
        {
            "id": str(k),
            "status": "failed" if k % 5 == 4 else "ok",
            "seconds": 0.5,
            "prompt": f"p{k}",
            "file": f"{k}.png",
        }
        for k in range(20)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / MANIFEST).write_text(lines + '{"id": "20", "sta')
    found = look(tmp_path, most=3)
    assert (found.done, found.failed, found.seconds) == (16, 4, 10.0)
    assert [record["id"] for record in found.latest] == ["18", "17", "16"]
    assert [record["id"] for record in found.problems] == ["19", "14", "9"]


def test_a_training_under_way(tmp_path):
    from diffusionfm.finetune import watch
    from diffusionfm.finetune.settings import RECORD

    assert watch.look(tmp_path) == watch.Look()
    (tmp_path / "samples").mkdir()
    for step in (0, 4):
        (tmp_path / f"samples/{step:07d}.png").write_bytes(b"")
    lines = [{"step": k, "loss": 1.0 / k, "seconds": 2.0 * k} for k in (1, 2, 3, 4)]
    common = {"best_step": 4, "change": 0.1}
    losses = {f"{name}_loss": 0.5 for name in ("validation", "seen", "own")}
    lines[3] |= common | losses | {f"base_{name}": value * 2 for name, value in losses.items()}
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 5, "lo')
    (tmp_path / RECORD).write_text(json.dumps({"held_out": ["a.png"]}))
    found = watch.look(tmp_path)
    assert (found.step, found.seconds, found.best, list(found.sheets)) == (4, 8.0, 4, [0, 4])
    assert found.chart.startswith("<svg") and "held out" in found.chart and found.words == []
    ended = {"why": "took all 4 steps"}
    (tmp_path / RECORD).write_text(json.dumps({"held_out": ["a.png"], "ended": ended}))
    words = watch.look(tmp_path).words
    assert words[0].startswith("It learned: the loss on pictures it had not seen fell by 50.0%")
    assert words[-1] == "It took all 4 steps."
