"""Shards as training batches: which caption, how often each source and thing, what is refused before training."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shards import ShardWriter
from diffusionfm.data.training import (
    DataConfig,
    all_captions,
    caption_batches,
    captions_of,
    choose_caption,
    collate_pictures,
    fixed_samples,
    latent_batches,
    latent_dataset,
    picture_batches,
    pixels,
    sample_weights,
)
from diffusionfm.features import join_captions

DRAWN_BY = {"cat": 8, "dog": 4, "axolotl": 1}  # phrase -> how many sources draw it


def picture(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 4), dtype=np.uint8))


def write(folder, per_shard=5):
    """13 training pictures: source s0 draws all three phrases, s1 to s3 two, s4 to s7 the cat alone."""
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for phrase, many in DRAWN_BY.items():
            for k in range(many):
                captions = [f"a s{k} drawing of a {phrase}", f"a {phrase}", phrase]
                meta = {"captions": captions, "phrase": phrase, "source": f"s{k}", "split": "train"}
                writer.write(f"{phrase}-{k}", picture(writer.count), captions[0], meta)
        writer.write("heldout", picture(99), "a bird", {"phrase": "bird", "source": "s0", "split": "heldout"})
    return folder


def by_key(folder, **keys) -> dict[str, float]:
    dataset = ShardDataset(folder, split="train")
    weights = sample_weights(dataset, DataConfig(shards=str(folder), **keys))
    assert weights is not None
    return {dataset.key(i): weight for i, weight in enumerate(weights.tolist())}


@pytest.mark.parametrize(
    ("told", "read"),
    [
        (["a red fox", "fox"], ["a red fox", "fox"]),
        ("a red fox", ["by .txt"]),  # no list: its letters are no captions
        ([{"id": 7, "caption": "a red fox"}], ["by .txt"]),  # as COCO has them
        (["", "a red fox", None], ["a red fox"]),
        ([], ["by .txt"]),
        (None, ["by .txt"]),
    ],
)
def test_captions_are_the_texts_that_the_json_lists_or_else_the_txt(tmp_path, told, read):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", picture(0), "by .txt", {"captions": told, "split": "train"})
    assert captions_of(ShardDataset(tmp_path)[0]) == all_captions(str(tmp_path)) == read


@pytest.mark.parametrize("with_parquet", [True, False])
def test_common_things_weigh_by_how_many_sources_draw_them(tmp_path, with_parquet):
    write(tmp_path)
    if not with_parquet:
        [path.unlink() for path in tmp_path.glob("*.parquet")]
    even = by_key(tmp_path, common=1.0)
    assert {key: even[f"{key}-0"] for key in DRAWN_BY} == {"cat": 1.0, "dog": 0.5, "axolotl": 0.125}
    assert all(even[key] == even[key.split("-")[0] + "-0"] for key in even)
    half = by_key(tmp_path, common=0.5, weights={"s0": 3.0, "default": 2.0})
    assert half["dog-0"] == pytest.approx(3 * 0.5**0.5) and half["dog-1"] == pytest.approx(2 * 0.5**0.5)
    assert half["cat-0"] == 3.0 and half["axolotl-0"] == pytest.approx(3 / 8**0.5)


def test_a_phrase_that_one_source_draws_twice_counts_once(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for k, source in enumerate(["one", "one", "two"]):
            meta = {"phrase": "cat", "source": source, "split": "train"}
            writer.write(f"{k}", picture(k), "a cat", meta)
    assert by_key(tmp_path, common=1.0, weights={"default": 4.0}) == dict.fromkeys("012", 1.0)


def test_pictures_come_as_often_as_they_weigh(tmp_path):
    cfg = DataConfig(shards=str(write(tmp_path)), common=1.0, weights={"s1": 2.0}, workers=0)
    batches = picture_batches(cfg, 50, seed=0)
    epochs = 300
    steps = next(step for step in range(10**5) if batches.epoch(step) == epochs)
    times = Counter(batches.dataset.key(i) for step in range(steps) for i in batches.indices(step))
    for key, weight in {"cat-0": 1, "cat-1": 2, "dog-0": 0.5, "dog-1": 1, "axolotl-0": 0.125}.items():
        assert times[key] / epochs == pytest.approx(weight, abs=0.1)


def test_without_weights_all_are_equal(tmp_path):
    dataset = ShardDataset(write(tmp_path), split="train")
    assert sample_weights(dataset, DataConfig()) is None
    assert sample_weights(dataset, DataConfig(styled={"s0": 0.5})) is None


def test_the_choice_of_a_caption_is_fixed_for_good():
    """Recorded: another choice would change what runs already begun read."""
    captions = ["full", "plain", "short"]
    draws = [0, 299, 300, 999, 1300, 2**63 + 999]
    assert [choose_caption(captions, d) for d in draws] == [
        "full",
        "full",
        "plain",
        "plain",
        "short",
        "plain",
    ]
    assert choose_caption(["only"], 999) == "only"


def captions_drawn(folder, steps=120, **keys) -> dict[str, float]:
    """Source -> share of its fullest caption in what a run reads."""
    batches = picture_batches(DataConfig(shards=str(folder), workers=0, **keys), 20, seed=1)
    full, all_of_it = Counter(), Counter()
    for step in range(steps):
        batch = batches.batch(step)
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            source = f"s{key[-1]}"
            all_of_it[source] += 1
            full[source] += " drawing of " in caption
    return {source: full[source] / many for source, many in all_of_it.items()}


def test_styled_sets_how_often_a_source_names_its_style(tmp_path):
    write(tmp_path)
    usual = captions_drawn(tmp_path)
    assert all(share == pytest.approx(0.3, abs=0.1) for share in usual.values())
    shares = captions_drawn(tmp_path, styled={"s0": 0.0, "s1": 1.0, "default": 0.8})
    assert shares.pop("s0") == 0 and shares.pop("s1") == 1
    assert all(share == pytest.approx(0.8, abs=0.12) for share in shares.values())
    two = captions_drawn(tmp_path, styled={"s1": 0.9})
    assert two["s1"] == pytest.approx(0.9, abs=0.08) and two["s0"] == usual["s0"]


def test_styled_leaves_the_order_and_the_other_captions_alone(tmp_path):
    write(tmp_path)
    plain, styled = (
        picture_batches(DataConfig(shards=str(tmp_path), styled=styled, workers=0), 20, seed=1)
        for styled in ({}, {"s2": 1.0})
    )
    for step in range(5):
        a, b = plain.batch(step), styled.batch(step)
        assert a["key"] == b["key"] and torch.equal(a["picture"], b["picture"])
        pairs = zip(a["key"], a["caption"], b["caption"], strict=True)
        assert all(one == other or key.endswith("2") for key, one, other in pairs)
    assert plain.fingerprint == styled.fingerprint


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"weights": {"s9": 1.0}}, "data.weights names s9; these shards hold s0, s1"),
        ({"styled": {"s9": 1.0}}, "data.styled names s9; these shards hold s0, s1"),
        ({"styled": {"s0": 1.2}}, "data.styled.s0 is a share, from 0 to 1, not 1.2"),
        ({"styled": {"default": -0.1}}, "data.styled.default is a share"),
        ({"weights": {"s0": -1.0}}, "weights must be 13 finite numbers of 0 or more"),
        ({"weights": {"default": 0.01}}, "scale them up"),
    ],
)
def test_bad_mixtures_name_their_key(tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        picture_batches(DataConfig(shards=str(write(tmp_path)), **keys), 4, seed=0)


def test_pictures_of_many_sizes_are_refused_with_the_fix(tmp_path):
    samples = [{"picture": picture(0, size)} for size in (8, 9)]
    with pytest.raises(ValueError, match="8x8, 9x9.*data.buckets"):
        collate_pictures([{**s, "key": "k", "caption": "c", "meta": {}} for s in samples])
    assert pixels(samples[0]).shape == (4, 8, 8)
    assert np.array_equal(pixels(samples[1]).numpy(), np.array(samples[1]["picture"]).transpose(2, 0, 1))


def test_a_cut_or_missing_shard_is_refused_before_training(tmp_path):
    cfg = DataConfig(shards=str(write(tmp_path)))
    before = picture_batches(cfg, 4, seed=0).fingerprint
    tar = tmp_path / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"00001.tar: truncated.*remove the .tar with its"):
        picture_batches(cfg, 4, seed=0)
    tar.unlink()
    with pytest.raises(ValueError, match=r"00001.tar is missing, its parquet is there.*put the tar back"):
        picture_batches(cfg, 4, seed=0)
    for name in ("00001.parquet", "00001_stats.json"):
        (tmp_path / name).unlink()
    fewer = picture_batches(cfg, 4, seed=0)
    assert len(fewer.dataset) == 8 and fewer.fingerprint != before


def test_a_shard_that_goes_away_while_training_is_named(tmp_path):
    batches = picture_batches(DataConfig(shards=str(write(tmp_path)), workers=1), 4, seed=0)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="0000.*put it back"):
        for batch, _ in zip(batches.stream(), range(20), strict=False):
            assert batch


def test_the_fingerprint_tells_what_would_change_the_order(tmp_path):
    def fingerprint(name, **keys):
        return picture_batches(DataConfig(shards=str(tmp_path / name), **keys), 4, seed=0).fingerprint

    for name in ("a", "b"):
        write(tmp_path / name)
    write(tmp_path / "other", per_shard=4)
    assert fingerprint("a") == fingerprint("b")
    assert picture_batches(DataConfig(shards=str(tmp_path / "a")), 8, seed=5).fingerprint == fingerprint("a")
    weighted = [fingerprint("a", common=1.0), fingerprint("a", weights={"s0": 2.0})]
    assert len({fingerprint("a"), fingerprint("other"), *weighted}) == 4
    (tmp_path / "b" / "00000.parquet").unlink()
    assert fingerprint("b") == fingerprint("a")


def test_fixed_samples_are_spread_and_the_same(tmp_path):
    dataset = ShardDataset(write(tmp_path), split="train")
    assert [s["key"] for s in fixed_samples(dataset, 3)] == [dataset.key(i) for i in (0, 4, 8)]
    assert len(fixed_samples(dataset, 100)) == 13
    with pytest.raises(ValueError, match="ask for 1 or more"):
        fixed_samples(dataset, 0)


def latent_shards(folder, text=True):
    with ShardWriter(folder) as writer:
        for i in range(6):
            captions = [f"full {i}", f"plain {i}"]
            tensors = {"latent": torch.full((2, 4, 4), float(i), dtype=torch.float16)}
            if text:
                words = [torch.full((3 + i, 5), 10.0 * i), torch.full((2, 5), 10.0 * i + 1)]
                tensors |= join_captions([features.half() for features in words])
            meta = {"vae": "abc", "text": "def" if text else None, "split": "train", "captions": captions}
            writer.write_members(f"k{i}", {"safetensors": save(tensors)}, captions[0], meta)
    return folder


def test_latents_bring_the_text_features_of_the_caption_chosen(tmp_path):
    cfg = DataConfig(shards=str(latent_shards(tmp_path)), styled={"default": 0.5}, workers=0)
    batch = latent_batches(cfg, "abc", 6, seed=0, text_hash="def").batch(0)
    assert batch["text"].shape[:2] == batch["mask"].shape and len(set(batch["caption"])) == 6
    for k, caption in enumerate(batch["caption"]):
        kind, i = caption.split()
        length, value = (3 + int(i), 10 * int(i)) if kind == "full" else (2, 10 * int(i) + 1)
        assert batch["mask"][k].sum() == length and (batch["text"][k, :length] == value).all()
        assert (batch["latent"][k] == int(i)).all()


def test_the_captions_of_a_mixture_come_without_what_they_stand_beside(tmp_path):
    pictures = DataConfig(shards=str(write(tmp_path / "pictures")), workers=0)
    latents = DataConfig(shards=str(latent_shards(tmp_path / "latents")), workers=0, styled={"default": 1.0})
    told, whole = caption_batches(pictures, 5, seed=3).batch(0), picture_batches(pictures, 5, seed=3).batch(0)
    assert set(told) == {"key", "caption"} and told == {name: whole[name] for name in told}
    assert set(caption_batches(latents, 6, seed=0).batch(0)["caption"]) == {f"full {i}" for i in range(6)}


def test_latents_of_other_networks_are_refused(tmp_path):
    latent_shards(tmp_path / "with")
    latent_shards(tmp_path / "without", text=False)
    with pytest.raises(ValueError, match="another autoencoder .*precompute.py .*overwrite=true"):
        latent_dataset(str(tmp_path / "with"), "xyz", "train")
    with pytest.raises(ValueError, match="another text encoder .*precompute.py .*overwrite=true"):
        latent_dataset(str(tmp_path / "with"), "abc", "train", text_hash="xyz")
    for name in ("with", "without"):
        assert len(latent_dataset(str(tmp_path / name), "abc", "train", text_hash="def")) == 6
    cfg = DataConfig(shards=str(tmp_path / "without"))
    assert "text" not in latent_batches(cfg, "abc", 2, seed=0).batch(0)
