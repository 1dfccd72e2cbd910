"""The drawing benchmark: its rival draws our picture, and it counts what a picture takes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "benchmarks"


def test_the_rival_draws_the_same_picture(tiny_pipe, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    by_diffusers = importlib.import_module("draw").by_diffusers
    ours = tiny_pipe("a red apple", num_inference_steps=5, guidance_scale=3.0).images[0]
    theirs = by_diffusers(tiny_pipe, "a red apple", 5, 3.0)
    assert abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_the_rival_shifts_its_times_as_ours_does(pipe, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    by_diffusers = importlib.import_module("draw").by_diffusers
    unshifted = pipe("a red apple", num_inference_steps=3, guidance_scale=3.0).images[0]
    pipe.defaults["shift"], pipe.scheduler = 2.0, type(pipe.scheduler)(shift=2.0)
    ours, theirs = (
        np.asarray(one, dtype=int)
        for one in (
            pipe("a red apple", num_inference_steps=3, guidance_scale=3.0).images[0],
            by_diffusers(pipe, "a red apple", 3, 3.0),
        )
    )
    assert abs(ours - theirs).max() <= 1 < abs(ours - np.asarray(unshifted, dtype=int)).max()


def test_it_counts_calls_and_products(tiny_model, tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, FOLDER / "draw.py", "--device", "cpu", "--model", tiny_model, "--json", out]
    command += ["--rounds", "1", "--steps", "2", "--guidance", "1", "--their-steps", "3"]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs, *parts = json.loads(out.read_text())["rows"]
    assert (ours["network calls"], theirs["network calls"], len(parts)) == (2, 6, 2)
    assert ours["GFLOP"] > 0 and 0 < ours["products"] < 1 and ours["times"] > 0
