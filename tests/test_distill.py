"""Few-step distillation: the teacher's paths, the student that learns their strides, the adapter merged again."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusionfm import flow, lora
from diffusionfm.checks import CHECKSUMS
from diffusionfm.data.shards import ShardWriter
from diffusionfm.distill import Paths, Strides, collate_strides, read_paths, teacher_strides
from diffusionfm.drawing import plan_tasks
from diffusionfm.images import read_parameters
from diffusionfm.objectives import FlowMatching
from diffusionfm.pipeline import DiffusionFMPipeline
from train.distill import main
from train.paths import main as draw_paths

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def teacher(tiny_model):
    pipe = DiffusionFMPipeline.from_pretrained(tiny_model)
    torch.nn.init.normal_(pipe.transformer.patch_out.weight, std=0.2)  # an untrained one goes nowhere
    pipe.defaults["shift"] = 2.0
    return pipe


def test_paths_are_the_samplers_own(teacher):
    begins, ends = teacher_strides(teacher, PROMPTS, [5, 6], strides=2, steps=4, guidance=3.0)
    assert begins.shape[:2] == ends.shape[:2] == (2, 2) and torch.equal(begins[:, 1], ends[:, 0])
    noise = teacher.noise([5, 6], teacher.defaults["height"], teacher.defaults["width"])
    assert torch.equal(begins[:, 0], noise)
    drawn = teacher(PROMPTS, seed=[5, 6], num_inference_steps=4, guidance_scale=3.0).images
    assert [a.tobytes() for a in teacher.finish(ends[:, -1])] == [b.tobytes() for b in drawn]
    with pytest.raises(ValueError, match="do not cut into 3"):
        teacher_strides(teacher, PROMPTS, [5, 6], strides=3, steps=4, guidance=3.0)


def test_the_teacher_answers_where_the_student_has_come(teacher, tiny_model):
    asked = {"strides": 2, "steps": 4, "guidance": 3.0}
    alone = teacher_strides(teacher, PROMPTS, [5, 6], **asked)
    student = DiffusionFMPipeline.from_pretrained(tiny_model)
    student.defaults["shift"] = 2.0
    torch.nn.init.normal_(student.transformer.patch_out.weight, std=0.1)
    begins, ends = teacher_strides(teacher, PROMPTS, [5, 6], **asked, student=student)
    assert torch.equal(begins[:, 0], alone[0][:, 0]) and torch.equal(ends[:, 0], alone[1][:, 0])
    drawn = student(PROMPTS, seed=[5, 6], num_inference_steps=2, guidance_scale=1.0).images
    times = flow.grid(2, teacher.defaults["shift"])
    tasks = plan_tasks(PROMPTS, None, [5, 6], 1)
    with torch.inference_mode():
        rest = flow.euler(student.velocity(tasks, [1.0] * 2, {}), begins[:, 1], times[1:])
        assert [a.tobytes() for a in student.finish(rest)] == [b.tobytes() for b in drawn]
        way = flow.euler(teacher.velocity(tasks, [3.0] * 2, {}), begins[:, 1], flow.grid(4, 2.0)[2:])
    assert torch.equal(ends[:, 1], way) and not torch.equal(begins[:, 1], ends[:, 0])


def stored(teacher, folder, seed=1, strides=2, **other):
    """A file of two paths, as `train/paths.py` writes it; `other` is what it tells otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    begins, ends = teacher_strides(teacher, PROMPTS, [seed, seed + 1], strides=strides, steps=4, guidance=3.0)
    drawn = {"seed": seed, "steps": 4, "guidance": 3.0, "shift": teacher.defaults["shift"], **other}
    told = {"model": teacher.fingerprint(), "drawn": json.dumps(drawn), "captions": json.dumps(PROMPTS)}
    tensors = {"from": begins.contiguous(), "to": ends.contiguous()}
    save_file(tensors, folder / "00000.safetensors", told)
    return begins, ends


def test_a_stride_made_right_has_no_loss_and_paths_of_another_model_are_refused(teacher, tmp_path):
    _, ends = stored(teacher, tmp_path)
    with pytest.raises(ValueError, match="no paths"):
        Paths([tmp_path / "nowhere"], teacher)
    paths = Paths([tmp_path], teacher)
    assert len(paths) == 4 and [paths[i]["caption"] for i in range(4)] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    batch = collate_strides([paths[i] for i in range(4)])
    assert torch.equal(batch["to"][0], ends[0, 0]) and batch["stride"].tolist() == [0, 1, 0, 1]
    times = flow.grid(2, teacher.defaults["shift"])
    student = Strides(teacher, 2, rank=2)
    ideal = (batch["to"] - batch["from"]) / (times[batch["stride"] + 1] - times[batch["stride"]])[
        :, None, None, None
    ]
    student.denoiser.forward = lambda x, t, text, mask: ideal
    loss, metrics = student(batch)
    assert float(loss) < 1e-9 and set(metrics) == {"loss_stride0", "loss_stride1"}
    teacher.transformer.patch_out.bias.data += 1
    with pytest.raises(ValueError, match="another model"):
        Paths([tmp_path], teacher)


def test_folders_are_joined_and_the_last_paths_of_the_first_kept_apart(teacher, tmp_path):
    begins, ends = stored(teacher, tmp_path / "a")
    stored(teacher, tmp_path / "b", seed=3)
    paths = Paths([tmp_path / "a", tmp_path / "b"], teacher, held_out=1)
    assert len(paths) == 6 and paths.captions == [PROMPTS[0], *PROMPTS]
    assert torch.equal(paths[1]["from"], begins[0, 1]) and torch.equal(paths[3]["from"], paths.begins[1, 1])
    unseen = paths.unseen
    assert (
        torch.equal(unseen[0], begins[1:]) and torch.equal(unseen[1], ends[1:]) and unseen[2] == PROMPTS[1:]
    )
    with pytest.raises(ValueError, match="2 paths, of which 2"):
        Paths([tmp_path / "a"], teacher, held_out=2)
    stored(teacher, tmp_path / "b", seed=5)
    assert Paths([tmp_path / "a", tmp_path / "b"], teacher, held_out=1).fingerprint != paths.fingerprint


def test_folders_that_do_not_go_together_are_refused(teacher, tmp_path):
    stored(teacher, tmp_path / "a")
    stored(teacher, tmp_path / "c", seed=3, strides=4)
    stored(teacher, tmp_path / "d", seed=3, guidance=5.0)
    stored(teacher, tmp_path / "e")
    stored(teacher, tmp_path / "f", student="0123456789ab")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "00000.safetensors").write_bytes(b"cut short")
    for folders, why in {
        "ac": "strides of .*c is 4, of .*a 2: make them alike",
        "ad": "guidance of .*d is 5, of .*a 3: make them alike",
        "ae": "e and .*a have one seed",
        "fa": "f holds a student's ways",
        "ag": "00000.safetensors is damaged, or no file of train/paths.py",
    }.items():
        with pytest.raises(ValueError, match=why):
            Paths([tmp_path / name for name in folders], teacher)
    teacher.defaults["shift"] = 3.0
    with pytest.raises(ValueError, match="drawn with shift 2, the model now has 3"):
        Paths([tmp_path / "a"], teacher)


def test_only_what_the_student_computes_counts(teacher):
    """The frozen denoiser's weights take no gradients: a third of a full backward and forward is spared."""
    student, whole = (
        Strides(teacher, 2, rank=2),
        FlowMatching(teacher.transformer, teacher.text_encoder, teacher.tokenizer),
    )
    for one in (student, whole):
        one.shapes = torch.Size((4, 4, 4)), torch.Size((4, teacher.transformer.config.text_dim))
    assert 0.6 < student.flops_per_sample / whole.flops_per_sample < 0.95


def test_the_end_of_a_students_own_way_is_measured(teacher):
    begins, ends = teacher_strides(teacher, PROMPTS, [1, 2], strides=4, steps=4, guidance=1.0)
    student = Strides(teacher, 4, rank=2)  # untrained, it makes the teacher's own steps
    same = student.validation(begins, ends, PROMPTS)
    assert max(same.values()) < 1e-9 and set(same) == {"heldout_loss", "heldout_end"}
    batch = [
        {"key": "", "from": begins[i, k], "to": ends[i, k], "stride": k, "caption": text}
        for i, text in enumerate(PROMPTS)
        for k in range(4)
    ]
    assert float(student(collate_strides(batch))[0].detach()) < 1e-9  # in training as well
    other = begins.clone()
    other[:, 1:] += 0.1
    apart = student.validation(other, ends, PROMPTS)  # its own way does not begin there
    assert apart["heldout_end"] == same["heldout_end"] and apart["heldout_loss"] > 1e-3
    moved = ends.clone()
    moved[:, -1] += 0.5
    away = student.validation(begins, moved, PROMPTS)["heldout_end"]
    assert away == pytest.approx(0.25 / float(moved[:, -1].var()), rel=1e-3)


def test_the_student_learns_and_its_merged_adapter_draws_as_it_did(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "model")
    teacher = DiffusionFMPipeline.from_pretrained(tmp_path / "model")
    stored(teacher, tmp_path / "paths")
    paths = Paths([tmp_path / "paths"], teacher)
    batch = collate_strides([paths[i] for i in range(4)])
    student = Strides(teacher, 2, rank=2)
    assert sum(p.numel() for p in student.networks()["lora"].parameters()) < 0.3 * sum(
        p.numel() for p in teacher.transformer.parameters()
    )
    optimizer = torch.optim.AdamW(student.networks()["lora"].parameters(), lr=2e-2)
    before = float(student(batch)[0].detach())
    for _ in range(60):
        optimizer.zero_grad()
        student(batch)[0].backward()
        optimizer.step()
    assert float(student(batch)[0].detach()) < 0.7 * before
    student.export(tmp_path / "model")
    told = json.loads((tmp_path / "model" / lora.FEW_STEP / "generation.json").read_text())
    assert told == {"steps": 2, "guidance": 1.0, "shift": 2.0, "teacher": student.teacher} and student.teacher
    live = teacher(PROMPTS, seed=3, num_inference_steps=2, guidance_scale=1.0).images
    second = Strides(DiffusionFMPipeline.from_pretrained(tmp_path / "model"), 2, rank=2)
    second.set_out_from(tmp_path / "model")
    for name, value in second.lora.items():
        torch.testing.assert_close(
            value, student.lora[name], atol=1e-3, rtol=1e-3
        )  # stored in half precision
    with pytest.raises(ValueError, match="no adapter of rank 3"):
        Strides(DiffusionFMPipeline.from_pretrained(tmp_path / "model"), 2, rank=3).set_out_from(
            tmp_path / "model"
        )
    fast = DiffusionFMPipeline.from_pretrained(tmp_path / "model", fast=True)
    assert (
        fast.defaults["steps"] == 2 and fast.defaults["guidance"] == 1.0 and fast.model_name == "model-fast"
    )
    for a, b in zip(live, fast(PROMPTS, seed=3).images, strict=True):
        gap = torch.tensor(list(a.tobytes()), dtype=torch.int) - torch.tensor(
            list(b.tobytes()), dtype=torch.int
        )
        assert gap.abs().max() <= 2  # the adapter is stored in half precision
    plain = DiffusionFMPipeline.from_pretrained(tmp_path / "model")
    assert plain.defaults["steps"] != 2 and plain.fingerprint() != fast.fingerprint()
    plain.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no few_step adapter"):
        DiffusionFMPipeline.from_pretrained(tmp_path / "bare", fast=True)


def test_an_adapter_is_refused_beside_another_denoiser_than_its_teacher(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "model")
    student = Strides(DiffusionFMPipeline.from_pretrained(tmp_path / "model"), 2, rank=2)
    student.export(tmp_path / "model")
    assert DiffusionFMPipeline.from_pretrained(tmp_path / "model", fast=True).defaults["steps"] == 2
    torch.nn.init.zeros_(teacher.transformer.patch_out.weight)
    teacher.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="few_step was distilled from another denoiser than that of .*train/paths.py"
    ):
        DiffusionFMPipeline.from_pretrained(tmp_path / "model", fast=True)
    (tmp_path / "model" / CHECKSUMS).unlink()  # then nothing tells
    assert DiffusionFMPipeline.from_pretrained(tmp_path / "model", fast=True).fast


def test_paths_drawn_otherwise_are_refused_and_those_there_are_kept(teacher, tmp_path, capsys, monkeypatch):
    with ShardWriter(tmp_path / "shards") as writer:
        for i, prompt in enumerate(PROMPTS):
            writer.write(f"k{i}", Image.new("RGBA", (32, 32)), prompt, {"split": "train"})
    teacher.save_pretrained(tmp_path / "model")
    told = {"model": tmp_path / "model", "output_dir": tmp_path / "paths", "data.shards": tmp_path / "shards"}
    told |= {"count": 2, "batch_size": 2, "steps": 2, "strides": 2, "dtype": "float32", "guidance": 3.0}
    argv = [f"{key}={value}" for key, value in told.items()]
    (file,) = draw_paths(argv).iterdir()
    before = file.stat().st_mtime_ns
    assert len(list(draw_paths([*argv, "count=4"]).iterdir())) == 2 and file.stat().st_mtime_ns == before
    with ShardWriter(tmp_path / "others") as writer:
        writer.write("k0", Image.new("RGBA", (32, 32)), "a green star", {"split": "train"})
    others = f"data.shards={tmp_path / 'others'}"
    learned = Strides(DiffusionFMPipeline.from_pretrained(tmp_path / "model"), 2, rank=2)
    torch.nn.init.normal_(next(p for name, p in learned.lora.items() if "lora_B" in name), std=0.5)
    learned.export(tmp_path / "run")
    student = f"student={tmp_path / 'run'}"
    assert len(list(draw_paths([*argv, student, f"output_dir={tmp_path / 'own'}"]).iterdir())) == 1
    model, fast = (DiffusionFMPipeline.from_pretrained(tmp_path / "model") for _ in range(2))
    lora.merge_few_step(fast.transformer, tmp_path / "run")
    for name, seed, who in (("paths/00001", 1_000_002, None), ("own/00000", 1_000_000, fast)):
        begins, ends, said = read_paths(tmp_path / f"{name}.safetensors")
        wanted = teacher_strides(model, json.loads(said["captions"]), range(seed, seed + 2), 2, 2, 3.0, who)
        assert torch.equal(begins, wanted[0].half()) and torch.equal(ends, wanted[1].half())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (shared,) = draw_paths([*argv, "count=4", f"output_dir={tmp_path / 'shared'}"]).iterdir()
    assert shared.name == "00001.safetensors"
    assert torch.equal(read_paths(shared)[1], read_paths(tmp_path / "paths" / shared.name)[1])
    monkeypatch.undo()
    assert draw_paths([*argv, "data.workers=2"])
    with pytest.raises(SystemExit):
        draw_paths([*argv, student, "steps=3", "strides=3", f"output_dir={tmp_path / 'three'}"])
    assert "learned steps 2, these paths are of {'steps': 3" in capsys.readouterr().err
    for other in ("guidance=2", "strides=1", "dtype=bfloat16", "seed=5", others, student):
        with pytest.raises(SystemExit):
            draw_paths([*argv, other])
        assert "drawn with other settings: give another output_dir" in capsys.readouterr().err
    torch.nn.init.zeros_(teacher.transformer.patch_out.weight)
    teacher.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        draw_paths(argv)
    assert "drawn by another model" in capsys.readouterr().err


def test_sample_sheets_of_the_student_do_not_name_the_teacher(teacher, tmp_path, capsys):
    teacher.save_pretrained(tmp_path / "model")
    stored(teacher, tmp_path / "paths")
    run, trainer = tmp_path / "run", {"steps": 1, "batch_size": 2, "warmup": 0, "sample_every": 1}
    trainer |= {"output_dir": tmp_path / "run", "device": "cpu", "tracker": "none"}
    told = [f"trainer.{key}={value}" for key, value in trainer.items()]
    main(
        [
            f"model={tmp_path / 'model'}",
            f"paths=[{tmp_path / 'paths'}]",
            "prompts=[a red circle]",
            "held_out=1",
            *told,
        ]
    )
    said = read_parameters(run / "samples" / "0000001.png")
    assert said["prompt"] == "a red circle" and said["steps"] == 2
    assert "model" not in said and "model_hash" not in said
