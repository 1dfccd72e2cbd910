"""The benchmark of the engine and the server runs, at toy size, and its rows hold together."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import serve  # noqa: E402


def test_the_engine_is_compared_with_one_at_a_time(tiny_model, capsys):
    rows = serve.main(
        ["--model", str(tiny_model), "--device", "cpu", "--rounds", "1", "--pictures", "2", "--steps", "3"]
    )
    assert [row["way"] for row in rows] == ["one at a time", "continuous"]
    assert all(row["pictures"] == 16 and 0 < row["p50 (s)"] <= row["p95 (s)"] for row in rows)
    assert rows[0]["of one at a time"] == 1.0 and "| continuous |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_server_is_loaded(tiny_model):
    (row,) = serve.main(
        ["--model", str(tiny_model), "--device", "cpu", "--load", "10", "--clients", "12", "--steps", "8"]
    )
    assert row["wrong"] == 0 and row["good"] > 0 and row["bad"] > 0 and row["hung up"] > 0
    assert row["descriptors at the end"] <= row["descriptors"] + 2
    assert (
        row["memory grew"] == pytest.approx(row["MiB at the end"] / row["MiB"] - 1)
        and row["memory grew"] < 0.3
    )
