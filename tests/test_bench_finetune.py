"""The LoRA benchmark's two loops train the same weights for the same steps."""

import importlib
from pathlib import Path

from diffusionfm.pipeline import DiffusionFMPipeline


def test_both_loops_train_the_same_weights(tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    bench = importlib.import_module("finetune")
    moved = {}
    for name, loop in bench.LOOPS.items():
        pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
        assert len(loop(pipe, steps=3, batch=4, rank=2)) == 3
        trained = {key: p for key, p in pipe.transformer.named_parameters() if "lora_B" in key}
        moved[name] = {key: tuple(p.shape) for key, p in trained.items() if p.abs().max() > 0}
    assert moved["ours"] == moved["plain"] and moved["ours"]
