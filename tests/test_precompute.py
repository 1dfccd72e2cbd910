"""Precompute: what is stored, stopped and gone on with, shared by ranks, refused when stale, and read by training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModel, PreTrainedTokenizerFast

from diffusionfm import features
from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shapes import shape_samples
from diffusionfm.data.shards import ShardWriter, shard_paths
from diffusionfm.data.training import collate_latents
from diffusionfm.objectives import FlowMatching
from diffusionfm.precompute import corpus
from diffusionfm.precompute.corpus import precompute
from diffusionfm.precompute.encoder import Encoder, EncoderConfig, load_encoder, text_hash
from diffusionfm.text import encode_prompts
from diffusionfm.transformer import DiffusionTransformer

ROOT = Path(__file__).resolve().parents[1]
PICTURES, A_SHARD = 44, 8
WHOLE = corpus.MAKING.format("*") + "/*_stats.json"


def draw_shards(folder: Path, count: int = PICTURES, seed: int = 0) -> Path:
    with ShardWriter(folder, samples_per_shard=A_SHARD) as writer:
        for key, picture, caption, meta in shape_samples(count, 32, seed):
            writer.write(key, picture, caption, meta)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return draw_shards(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cfg(tiny_model) -> EncoderConfig:
    places = {name: str(tiny_model / name) for name in ("vae", "text_encoder", "tokenizer")}
    return EncoderConfig(**places, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def whole(shards, cfg, tmp_path_factory) -> Path:
    return precompute(shards, tmp_path_factory.mktemp("run"), cfg) / "latents"


def command(shards: Path, run: Path, cfg: EncoderConfig, *more: str) -> list[str]:
    names = [f"{name}={getattr(cfg, name)}" for name in ("vae", "text_encoder", "tokenizer")]
    told = [f"shards={shards}", f"trainer.output_dir={run}", f"trainer.batch_size={cfg.batch_size}", *names]
    return [sys.executable, str(ROOT / "train/precompute.py"), *told, *more]


def test_latents_and_the_features_of_every_caption_are_stored(shards, cfg, whole):
    pictures, stored = ShardDataset(shards), ShardDataset(whole, needs=("safetensors", "txt"))
    assert [pictures.key(i) for i in range(PICTURES)] == [stored.key(i) for i in range(PICTURES)]
    assert [path.name for path in stored.paths] == [path.name for path in pictures.paths]
    vae = AutoencoderKL.from_pretrained(cfg.vae).eval()
    encoder = AutoModel.from_pretrained(cfg.text_encoder, add_pooling_layer=False).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cfg.tokenizer)
    for i in (0, PICTURES - 1):
        tensors, meta = load(stored.read(i)["safetensors"]), stored.meta(i)
        assert meta["text"] == text_hash(encoder, tokenizer)
        with torch.no_grad():
            [picture] = corpus_pixels(pictures, i)
            near = torch.nn.functional.mse_loss(vae.encode(picture[None])[0], tensors["latent"].float())
            assert near < 1e-3 and tensors["latent"].dtype == torch.float16
            for k, caption in enumerate(meta["captions"]):
                text, _, _ = encode_prompts(tokenizer, encoder, [caption])
                torch.testing.assert_close(
                    features.caption_features(tensors, k).float(), text[0], atol=4e-3, rtol=4e-3
                )
    assert len(tensors["text_ends"]) == len(meta["captions"])
    empty = features.empty_prompt(whole)
    with torch.no_grad():
        torch.testing.assert_close(
            empty.float(), encode_prompts(tokenizer, encoder, [""])[0][0], atol=4e-3, rtol=4e-3
        )


def corpus_pixels(dataset: ShardDataset, i: int) -> list[torch.Tensor]:
    from diffusionfm.data.training import pixels

    return [pixels(dataset[i]).float() / 255]


def test_without_a_text_encoder_latents_alone_are_stored(shards, cfg, whole, tmp_path):
    alone = EncoderConfig(vae=cfg.vae, batch_size=4, dtype="bfloat16", device="cpu")
    out = precompute(shards, tmp_path, alone, limit=10) / "latents"
    stored = ShardDataset(out, needs=("safetensors", "txt"))
    tensors = load(stored.read(0)["safetensors"])
    assert len(stored) == 10 and set(tensors) == {"latent"} and tensors["latent"].dtype == torch.bfloat16
    assert "text" not in stored.meta(0) and features.empty_prompt(out) is None
    features.refuse_stale(out, stored.meta(0), stored.meta(0)["vae"], "any text encoder will do")


def test_nothing_is_encoded_twice_and_nothing_stale_is_kept_or_lost(shards, cfg, tmp_path, capsys):
    pictures = draw_shards(tmp_path / "pictures", 16)
    run = precompute(pictures, tmp_path / "run", cfg)
    first = contents(run / "latents")
    times = {path: path.stat().st_mtime_ns for path in (run / "latents").iterdir()}
    capsys.readouterr()
    precompute(pictures, run, cfg)
    assert "is complete" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (run / "latents").iterdir()}

    other = EncoderConfig(vae=cfg.vae, batch_size=4, dtype="bfloat16", device="cpu")
    with pytest.raises(
        ValueError, match="holds another 00000.tar .*dtype float16, now bfloat16.*overwrite=true"
    ):
        precompute(pictures, run, other)
    (tmp_path / "pictures/00001.tar").write_bytes((shards / "00002.tar").read_bytes())
    with pytest.raises(ValueError, match="holds another 00001.tar .source.*overwrite=true"):
        precompute(pictures, run, cfg)
    assert contents(run / "latents") == first
    precompute(pictures, run, other, overwrite=True)
    assert not set(contents(run / "latents").items()) & set(first.items())
    fewer = draw_shards(tmp_path / "fewer", 8)
    with pytest.raises(ValueError, match="holds 00001.tar, which the source lacks.*overwrite=true"):
        precompute(fewer, run, other)
    precompute(fewer, run, other, overwrite=True)
    assert sorted(path.name for path in (run / "latents").glob("*.tar")) == ["00000.tar"]


@pytest.mark.slow
def test_killed_at_any_shard_it_goes_on_with_the_whole_ones(shards, cfg, whole, tmp_path):
    """SIGKILL twice, each after one more shard: no whole shard is made again, and the end is the same."""
    kept: dict[str, int] = {}
    for k in range(2):
        child = subprocess.Popen(
            command(shards, tmp_path, cfg), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob(WHOLE))) <= k and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "latents").exists():
            break  # the machine was faster than the signal
        for stats in tmp_path.glob(WHOLE):
            kept.setdefault(stats.name, stats.stat().st_mtime_ns)
    precompute(shards, tmp_path, cfg)
    out = tmp_path / "latents"
    assert kept and all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert contents(out) == contents(whole) and not list(tmp_path.glob(corpus.MAKING.format("*")))


def test_a_killed_shard_leaves_nothing_that_is_taken_for_whole(shards, cfg, whole, tmp_path):
    """Killed after its tar was renamed into place, before its stats were; and with its staging folder still there."""
    jobs, made_by = corpus.plan(shard_paths(shards)), load_encoder(cfg).made_by
    making = tmp_path / corpus.MAKING.format(corpus.identity(jobs, made_by))
    staging = making / f".00001.{socket.gethostname()}"
    staging.mkdir(parents=True)
    for folder in (making, staging):
        (folder / "00000.tar").write_bytes(b"half")
    precompute(shards, tmp_path, cfg)
    assert contents(tmp_path / "latents") == contents(whole)


def test_an_unfinished_run_of_other_settings_is_not_gone_on_with(shards, cfg, whole, tmp_path):
    other = tmp_path / corpus.MAKING.format("other")
    other.mkdir()
    (other / "00000_stats.json").write_text("{}")
    with pytest.raises(ValueError, match="other.partial was left unfinished.*overwrite=true"):
        precompute(shards, tmp_path, cfg)
    precompute(shards, tmp_path, cfg, overwrite=True)
    assert contents(tmp_path / "latents") == contents(whole) and not other.exists()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_shards_and_give_the_same_bytes(shards, cfg, whole, tmp_path, monkeypatch, world):
    """Ranks never talk, so that running them in turn shows what running them at once does."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in reversed(range(world)):
        assert not (tmp_path / "latents").exists()
        monkeypatch.setenv("RANK", str(rank))
        precompute(shards, tmp_path, cfg)
    assert contents(tmp_path / "latents") == contents(whole)


def test_ranks_make_a_source_that_grew_anew_together(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def by_ranks(pictures: Path, **more: bool) -> None:
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            precompute(pictures, tmp_path / "run", cfg, **more)

    by_ranks(draw_shards(tmp_path / "few", 3 * A_SHARD))
    more = draw_shards(tmp_path / "more", 4 * A_SHARD)  # rank 0's two shards are as they were
    by_ranks(more, overwrite=True)
    assert len(list((tmp_path / "run/latents").glob("*.tar"))) == len(list(more.glob("*.tar")))


@pytest.mark.slow
def test_under_torchrun_with_more_ranks_than_shards(cfg, tmp_path):
    pictures = draw_shards(tmp_path / "pictures", 16)
    alone = precompute(pictures, tmp_path / "alone", cfg) / "latents"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = subprocess.run(
        [*launch, *command(pictures, tmp_path / "run", cfg)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "run/latents") == contents(alone)
    assert (tmp_path / "run/config.yaml").is_file() and "is complete: 16 pictures" in done.stdout


def test_broken_samples_and_shards_are_left_out_and_named(cfg, tmp_path, capsys):
    pictures = draw_shards(tmp_path / "pictures", 16)
    tar = bytearray((pictures / "00000.tar").read_bytes())
    at = tar.index(b"RIFF")
    tar[at : at + 4] = b"JUNK"
    (pictures / "00000.tar").write_bytes(tar)
    (pictures / "00001.tar").write_bytes(b"")
    out = precompute(pictures, tmp_path / "run", cfg) / "latents"
    said = capsys.readouterr().out
    assert "00001.tar is left out" in said and "is complete: 7 pictures" in said
    assert len(ShardDataset(out, needs=("safetensors", "txt"))) == 7
    assert json.loads((out / "00000_stats.json").read_text())["failed_to_resize"] == 1
    (pictures / "00000.tar").write_bytes(bytes(tar).replace(b"RIFF", b"JUNK"))
    with pytest.raises(ValueError, match="no usable sample"):
        precompute(pictures, tmp_path / "none", cfg)
    said = capsys.readouterr().out
    assert "none of its 8 pictures can be read" in said and not (tmp_path / "none/latents").exists()


def test_pictures_of_unlike_size_share_a_shard(cfg, tmp_path):
    with ShardWriter(tmp_path / "pictures") as writer:
        for k, size in enumerate((32, 48, 32, 64)):
            [(_, picture, caption, meta)] = shape_samples(1, size, seed=k)
            writer.write(f"{k}", picture, caption, meta)
    out = precompute(tmp_path / "pictures", tmp_path / "run", cfg) / "latents"
    stored = ShardDataset(out, needs=("safetensors", "txt"))
    sides = [load(stored.read(i)["safetensors"])["latent"].shape[-1] for i in range(4)]
    assert sides == [4, 6, 4, 8]


def test_bad_input_is_told_before_any_work(shards, cfg, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="text_encoder and tokenizer belong together"):
        EncoderConfig(vae=cfg.vae, text_encoder=cfg.text_encoder)
    with pytest.raises(ValueError, match="dtype must be one of"):
        EncoderConfig(vae=cfg.vae, dtype="int8")
    with pytest.raises(ValueError, match="engine"):
        precompute(shards, tmp_path / "run", cfg, engine="spark")
    with pytest.raises(ValueError, match="not a folder"):
        precompute(tmp_path / "nowhere", tmp_path / "run", cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        precompute(shards, tmp_path / "run", cfg, engine="ray")
    assert not (tmp_path / "run").exists()


def test_numbers_too_large_for_half_precision_are_refused(cfg):
    encoder = Encoder(cfg)
    with pytest.raises(ValueError, match="dtype=bfloat16"):
        encoder._stored(torch.full((3,), 1e6))


# ---- what training does with them --------------------------------------------------------------------------------


def test_captions_joined_and_parted():
    parts = [torch.randn(length, 3) for length in (4, 2, 7)]
    stored = features.join_captions(parts)
    assert stored["text"].shape == (13, 3) and stored["text_ends"].tolist() == [4, 6, 13]
    for i, part in enumerate(parts):
        assert torch.equal(features.caption_features(stored, i), part)


def test_a_batch_takes_the_captions_chosen_padded_to_a_multiple():
    captions = [["a red star", "star"], ["heart"], ["blue", "a moon", "moon"]]
    lengths = {"a red star": 5, "star": 3, "heart": 3, "blue": 3, "a moon": 4, "moon": 3}
    parts = {caption: torch.randn(length, 6).half() for caption, length in lengths.items()}
    stored = [features.join_captions([parts[c] for c in of]) for of in captions]
    chosen = ["star", "heart", "a moon"]
    batch = features.chosen_text(stored, captions, chosen, multiple=8)
    assert batch["text"].shape == (3, 8, 6) and batch["text"].dtype == torch.float16
    assert batch["mask"].sum(1).tolist() == [3, 3, 4]
    for row, keep, one in zip(batch["text"], batch["mask"], chosen, strict=True):
        assert torch.equal(row[keep], parts[one]) and not row[~keep].any()
    assert features.chosen_text([{"latent": torch.zeros(1)}], [["a"]], ["a"]) == {}


@pytest.mark.parametrize("tokens", [2, 11])
def test_dropped_prompts_become_the_empty_prompt(tokens):
    text, mask = features.pad_captions([torch.randn(length, 3) for length in (5, 9)], multiple=2)
    empty = torch.randn(tokens, 3).half()
    got, seen = features.drop_prompts(text, mask, torch.tensor([True, False]), empty)
    assert got.shape[1] == max(10, tokens) and torch.equal(got[0, :10], text[0])
    assert seen.sum(1).tolist() == [5, tokens]
    assert torch.equal(got[1, :tokens], empty.float()) and not got[1, tokens:].any()


def test_features_read_are_features_encoded(cfg, whole):
    """A batch's text as training would encode it, against the text that was stored."""
    stored = ShardDataset(whole, needs=("safetensors", "txt"))
    samples = [stored.read(i) for i in range(6)]
    captions = [s["meta"]["captions"] for s in samples]
    chosen = [of[k % len(of)] for k, of in enumerate(captions)]
    batch = features.chosen_text([load(s["safetensors"]) for s in samples], captions, chosen, multiple=4)
    encoder = Encoder(cfg)
    with torch.no_grad():
        text, mask, _ = encode_prompts(encoder.tokenizer, encoder.text_encoder, chosen, multiple=4)
    assert torch.equal(mask, batch["mask"])
    torch.testing.assert_close(batch["text"].float(), text, atol=4e-3, rtol=4e-3)


def test_training_on_stored_text_is_training_on_encoded_text(tiny_model, cfg, whole):
    """The same loss but for rounding, dropped prompts included; another caption's features give another."""
    encoder = Encoder(cfg)
    denoiser = DiffusionTransformer.from_pretrained(tiny_model / "transformer")
    objective = FlowMatching(denoiser, encoder.text_encoder, encoder.tokenizer, prompt_dropout=0.5)
    stored = ShardDataset(whole, needs=("safetensors", "txt"))
    batch = collate_latents([{**stored.read(i), "draw": 1000 * i + 999} for i in range(8)])
    assert {"text", "mask"} <= set(batch)
    shorter = collate_latents([stored.read(i) for i in range(8)], text_multiple=8)
    assert (
        batch["text"].shape[1] % 32 == 0 and shorter["text"].shape[1] % 8 == 0 < 32 - shorter["text"].shape[1]
    )
    live = {key: batch[key] for key in ("latent", "caption")}
    losses = []
    for told in (live, batch, {**batch, "text": batch["text"].roll(1, 0)}):
        torch.manual_seed(0)
        losses.append(objective(told)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)


def test_stale_shards_are_refused_with_the_command_that_mends_them(cfg, whole):
    meta = ShardDataset(whole, needs=("safetensors", "txt")).meta(0)
    features.refuse_stale(whole, meta, meta["vae"], meta["text"])
    with pytest.raises(ValueError, match="another autoencoder.*precompute.py.*overwrite=true"):
        features.refuse_stale(whole, meta, "0" * 12, meta["text"])
    for other in (None, "0" * 12):
        with pytest.raises(ValueError, match="another text encoder or tokenizer.*precompute.py"):
            features.refuse_stale(whole, meta, meta["vae"], other)


def test_the_hash_tells_text_encoders_and_tokenizers_apart(cfg):
    encoder = Encoder(cfg)
    known = encoder.made_by["text"]
    encode_prompts(encoder.tokenizer, encoder.text_encoder, ["a much longer prompt than before"])
    assert text_hash(encoder.text_encoder, encoder.tokenizer) == known
    encoder.tokenizer.add_tokens(["zebra"])
    assert text_hash(encoder.text_encoder, encoder.tokenizer) != known
    other = Encoder(cfg)
    next(other.text_encoder.parameters()).data[0] += 1
    assert text_hash(other.text_encoder, other.tokenizer) != known
    assert (
        load_file(Path(cfg.vae) / "diffusion_pytorch_model.safetensors").keys()
        == other.vae.state_dict().keys()
    )
