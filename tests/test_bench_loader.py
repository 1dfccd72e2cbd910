"""The benchmarks of the loader and of resuming run, at toy size, and their rows hold together."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionfm.data.shards import ShardWriter

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import loader  # noqa: E402
import resume  # noqa: E402


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(24):
            picture = np.random.default_rng(i).integers(0, 256, (16, 16, 4), dtype=np.uint8)
            writer.write(f"k{i}", Image.fromarray(picture), f"number {i}", {"split": "train"})
    return tmp_path / "shards"


def test_the_loader_is_compared_with_its_rivals(shards, tmp_path, capsys):
    options = ["--shards", str(shards), "--pictures", "16", "--batch", "4", "--rounds", "1"]
    rows = loader.main(
        [*options, "--train-steps", "1", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    )
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    by_name = {row["loader"]: row for row in rows}
    assert by_name["plain PIL decode"]["of the plain loop"] == 1.0
    timed = [row for row in rows if "pictures/s a core" in row]
    assert len(timed) >= 4 and all(row["pictures"] == 16 and row["pictures/s a core"] > 0 for row in timed)
    assert 0 <= rows[-1]["mean wait"] <= 1 and "| ours |" in capsys.readouterr().out


def test_resuming_is_measured_at_each_size(capsys):
    rows = resume.main(["--samples", "200", "700", "--shards-to", "200"])
    assert [row["samples"] for row in rows] == [200, 700]
    assert "open (s)" in rows[0] and "open (s)" not in rows[1] and "| 700 |" in capsys.readouterr().out
