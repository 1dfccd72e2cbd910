"""The batch benchmark runs as its first lines say, and its rivals draw the same pictures."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import batch  # noqa: E402


def test_the_batch_is_compared_with_loops_that_draw_the_same(tiny_model, tmp_path, capsys):
    options = ["--model", str(tiny_model), "--pictures", "3", "--batch-sizes", "1", "2", "--rounds", "1"]
    rows = batch.main([*options, "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    by_way = {row["way"]: row for row in rows}
    assert by_way["diffusers, one by one"]["differs from ours, of 255"] <= 1
    assert {"diffusers, 2 at a time", "batch, 1 at a time", "drawing alone, 2", "plain loop, 2"} < set(by_way)
    assert (
        all(row["pictures/s"] > 0 for row in rows) and "%" in by_way["batch, 2 at a time"]["beyond drawing"]
    )
    assert "| one by one |" in capsys.readouterr().out
