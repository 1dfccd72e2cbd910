"""LoRAs in the engine: requests with different ones take turns, and more come while others draw."""

from __future__ import annotations

import threading

import pytest
from serving import Gate, all_near, near, write_lora

from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, Request


def test_requests_with_other_loras_take_calls_in_turn(tiny_model, tiny_pipe, tmp_path):
    folders = [write_lora(tiny_model, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    wanted = [(), (("one", 1.0),), (("two", 0.5),), (("one", 0.5), ("two", 1.0))]
    expected = []
    for loras in wanted:
        plain = DiffusionFMPipeline.from_pretrained(tiny_model)
        for name, scale in loras:
            plain.load_lora(tmp_path / name, scale)
        expected.append(plain("a red apple", seed=1, num_inference_steps=5).images[0])
    pipe, gate = DiffusionFMPipeline.from_pretrained(tiny_model), Gate()
    for folder in folders:
        pipe.load_lora(folder)
    with Engine(pipe) as engine:
        held = engine.submit(Request("fish", steps=2), "z", gate)
        assert gate.reached.wait(60)
        futures = [
            engine.submit(Request("a red apple", seed=1, steps=5, loras=loras))
            for loras in wanted
            for _ in "ab"
        ]
        gate.opened.set()
        drawn = [future.result(60).images[0] for future in futures]
        assert held.result(60)
        assert engine.counts.calls <= 5 * len(wanted) + 2
    assert all_near(drawn[::2], expected) and all_near(drawn[1::2], expected)
    assert len({image.tobytes() for image in expected}) == 4


def test_a_dora_leaves_the_layer_s_own_magnitudes_behind(tiny_model, tiny_pipe, tmp_path):
    folder = write_lora(tiny_model, tmp_path / "dora", 3, use_dora=True)
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    pipe.load_lora(folder)
    expected = pipe("a red apple", seed=1).images[0]
    bare = tiny_pipe("a red apple", seed=1).images[0]
    with Engine(pipe) as engine:
        for loras, image in (((), bare), ((("dora", 1.0),), expected), ((("dora", 0.0),), bare)):
            drawn = engine.submit(Request("a red apple", seed=1, loras=loras)).result(60)
            assert near(drawn.images[0], image)
    assert not near(bare, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_added_while_others_draw_is_the_one_loaded_before(
    dora, tiny_model, tiny_pipe, tmp_path, monkeypatch
):
    folders = [write_lora(tiny_model, tmp_path / f"l{k}", k, use_dora=dora and k != 1) for k in range(4)]
    expected = []
    for folder in folders:
        plain = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
        plain.load_lora(folder)
        expected.append(plain("a red apple", seed=1, num_inference_steps=5).images[0])
    bare = tiny_pipe("a red apple", seed=1, num_inference_steps=5).images[0]
    assert not near(expected[3], bare)
    monkeypatch.setattr("diffusionfm.serve.wardrobe.MOST_PRIVATE", 2)
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model, dtype="float32")
    pipe.load_lora(folders[0])
    gate = Gate()
    with Engine(pipe) as engine:
        first = engine.submit(Request("a red apple", seed=1, steps=5), on_step=gate)
        assert gate.reached.wait(60)
        threads = [threading.Thread(target=engine.add_lora, args=(folders[k], f"p{k}+s")) for k in (1, 2)]
        for thread in threads:
            thread.start()
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert near(first.result(60).images[0], bare)
        engine.add_lora(folders[1], "p1+s")  # again: nothing but used last
        engine.add_lora(folders[3], "p3+s")
        assert engine.wardrobe.private == ["p1+s", "p3+s"] and list(pipe.loras) == ["l0"]
        with pytest.raises(ValueError, match="no LoRA 'p2\\+s' here: l0$"):
            engine.submit(Request("x", loras=(("p2+s", 1.0),)))
        for name, k in (("p1+s", 1), ("l0", 0), ("p3+s", 3), ("p1+s", 1)):
            drawn = engine.submit(Request("a red apple", seed=1, steps=5, loras=((name, 1.0),))).result(60)
            assert near(drawn.images[0], expected[k]), name
            assert drawn.told[0]["lora"] == [f"{name.partition('+')[0]}:1"]  # its secret is nobody's
        assert near(engine.submit(Request("a red apple", seed=1, steps=5)).result(60).images[0], bare)
        with pytest.raises(ValueError, match="no LoRA folder"):
            engine.add_lora(tmp_path / "nowhere", "p9")
    with pytest.raises(Closed):
        engine.add_lora(folders[2], "p2")
