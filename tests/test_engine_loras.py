"""LoRAs in the engine: requests with different ones take turns, and more come while others draw."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Gate, all_near, near, write_lora

from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Closed, Request
from diffusionfm.serve.wardrobe import Wardrobe


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
    monkeypatch.setattr("diffusionfm.serve.wardrobe.GRACE", -1.0)
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
        assert [*engine.wardrobe.private] == ["p1+s", "p3+s"] and list(pipe.loras) == ["l0"]
        with pytest.raises(ValueError, match="no LoRA 'p2' here: l0$"):
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


def test_requests_are_taken_while_a_lora_is_added(tiny_model, tmp_path, monkeypatch):
    adding, opened = threading.Event(), threading.Event()

    def slowly(*_):
        adding.set()
        assert opened.wait(60)

    monkeypatch.setattr(Wardrobe, "add", slowly)
    with Engine(DiffusionFMPipeline.from_pretrained(tiny_model)) as engine, ThreadPoolExecutor() as pool:
        added = pool.submit(engine.add_lora, tmp_path, "p+s")
        assert adding.wait(60)
        asked = pool.submit(engine.submit, Request("fish", steps=1))
        waiting = pool.submit(lambda: engine.waiting)
        try:
            drawn = asked.result(10)
            assert waiting.result(10) <= 1
        finally:
            opened.set()
        assert added.result(60) is None and drawn.result(60).images


@pytest.fixture
def wardrobe(tiny_model, tmp_path, monkeypatch):
    """One with a public LoRA whose name has a "+"; adding reads no file."""
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    pipe.load_lora(write_lora(tiny_model, tmp_path / "a+b", 1))
    for name in ("check_lora", "check_base", "add_lora"):
        monkeypatch.setattr(f"diffusionfm.serve.wardrobe.{name}", lambda *_: None)
    return Wardrobe(pipe)


def test_private_loras_stay_for_who_has_just_asked_for_them(wardrobe, tmp_path, monkeypatch):
    names = [f"p{k}+s" for k in range(24)]  # two grids of twelve
    for name in names:
        wardrobe.add(tmp_path, name)
    wardrobe.check(tuple((name, 1.0) for name in names))
    monkeypatch.setattr("diffusionfm.serve.wardrobe.GRACE", -1.0)
    wardrobe.add(tmp_path, names[0])  # again: used last
    wardrobe.add(tmp_path, "new+s", in_use=[names[1]])
    assert [*wardrobe.private] == [names[0], names[1], *names[11:], "new+s"]
    wardrobe.wear(((names[11], 1.0),))
    with pytest.raises(ValueError, match="'p2' is no longer here"):
        wardrobe.wear(((names[2], 1.0),))


def test_as_many_private_loras_are_kept_as_there_may_be(wardrobe, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusionfm.serve.wardrobe.GRACE", -1.0)
    for k in range(17):
        wardrobe.add(tmp_path, f"p{k}+s")
    assert [*wardrobe.private] == [f"p{k}+s" for k in range(1, 17)]


def test_a_secret_is_never_told_not_even_while_loras_come_and_go(wardrobe):
    asked = (("a+b", 1.0), ("p+secret", 0.5))
    assert wardrobe.named(asked) == {"a+b": 1.0, "p": 0.5}  # whether or not the second is there
    with pytest.raises(ValueError, match=r"no LoRA 'p' here: a\+b$"):
        wardrobe.check(asked)
