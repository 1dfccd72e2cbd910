"""Buckets: shapes, the fewest pixels cropped, batches of one shape at any number of ranks, no sample lost."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from diffusionfm.config import ConfigError, load_config
from diffusionfm.data.buckets import (
    BucketBatches,
    BucketConfig,
    bucket_shapes,
    choose_shapes,
    crop_box,
    fit,
    nearest_shapes,
    pictures_of,
)
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shards import ShardWriter
from diffusionfm.data.training import (
    DataConfig,
    collate_latents,
    fixed_samples,
    latent_batches,
    picture_batches,
)

SIZES = [(64, 64), (96, 48), (48, 96), (120, 40), (70, 60)]  # width, height


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8))


def write(folder, count=60):
    with ShardWriter(folder, samples_per_shard=25) as writer:
        for i in range(count):
            meta = {"split": "train" if i % 6 else "heldout", "source": f"s{i % 2}", "phrase": f"p{i}"}
            writer.write(f"k{i}", picture(i, SIZES[i % 5]), f"number {i}", meta)
    return folder


def config(folder, **changes) -> DataConfig:
    buckets = {"tokens": 256, "sides": [32], "multiple": 8, "patch": 4} | changes
    return DataConfig(shards=str(folder), buckets=BucketConfig(**buckets))


def toy(counts: dict[tuple[int, int], int], batch_size=2, weights=None, seed=3, **changes) -> BucketBatches:
    """Batches of samples {"key": i} whose shapes come as often as `counts` says, mixed."""
    shapes = np.repeat(np.array(list(counts)), list(counts.values()), axis=0)
    shapes = shapes[np.random.default_rng(0).permutation(len(shapes))]
    cfg = BucketConfig(**{"tokens": 32, "sides": [8], "multiple": 4, "patch": 2} | changes)
    data = [{"key": i, "is": tuple(shape)} for i, shape in enumerate(shapes.tolist())]
    return BucketBatches(data, list, shapes, cfg, batch_size, seed, weights, workers=0)


def test_shapes_are_multiples_of_about_one_area():
    shapes = bucket_shapes(512, 64)
    assert (512, 512) in shapes and (384, 704) in shapes and (256, 1024) in shapes
    assert all((columns, rows) in shapes for rows, columns in shapes) and len(set(shapes)) == len(shapes)
    for rows, columns in shapes:
        assert rows % 64 == columns % 64 == 0 and max(rows, columns) <= 4 * min(rows, columns)
        assert abs(rows * columns / 512**2 - 1) < 0.2
    assert bucket_shapes(64, 64) == [(64, 64)]


def test_pictures_go_to_the_side_and_the_aspect_ratio_nearest_to_them():
    cfg = BucketConfig(tokens=4096, sides=[512, 256], multiple=64)
    sizes = np.array([(512, 512), (1000, 1000), (500, 500), (300, 300), (100, 90), (2000, 1000), (90, 4000)])
    shapes = nearest_shapes(sizes, cfg).tolist()
    assert choose_shapes(np.repeat(sizes, 50, axis=0), cfg, batch_size=1)[::50].tolist() == shapes
    assert shapes[:5] == [[512, 512], [512, 512], [512, 512], [256, 256], [256, 256]]
    assert shapes[5] == [384, 704] and shapes[6] == [1024, 256]


def test_rare_shapes_join_the_nearest_that_fills_a_batch():
    cfg = BucketConfig(tokens=1024, sides=[256], multiple=64)  # four pictures of 256 x 256 a step
    sizes = np.array(
        [(256, 256)] * 20 + [(512, 128)] * 20 + [(500, 130)] * 3 + [(300, 240)] * 2 + [(240, 300)]
    )
    shapes = choose_shapes(sizes, cfg, batch_size=1).tolist()
    assert Counter(map(tuple, shapes)) == {(256, 256): 23, (128, 512): 23}
    assert shapes[-1] == [256, 256] and shapes[40] == [128, 512]
    light = np.array([1.0] * 20 + [0.1] * 20 + [1.0] * 6)
    assert set(map(tuple, choose_shapes(sizes, cfg, 1, light).tolist())) >= {(128, 512)}
    assert set(map(tuple, choose_shapes(sizes, cfg, 1, light * 0.1).tolist())) == {(256, 256)}


@pytest.mark.parametrize(
    ("size", "shape"), [((90, 40), (32, 64)), ((40, 90), (64, 32)), ((50, 50), (16, 48))]
)
def test_crops_keep_all_of_one_side_and_the_middle_of_the_other(size, shape):
    left, top, right, bottom = crop_box(size, shape)
    assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0])
    assert min(left, top) == 0 and (left + right, top + bottom) == pytest.approx(size)
    ramp = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(size[0]), np.arange(size[1])[:, None]
    ramp[..., 3] = 255
    seen = np.array(fit(Image.fromarray(ramp), shape)).astype(float)
    assert seen.shape == (*shape, 4)
    middle = (
        seen[:, shape[1] // 2 - 1 : shape[1] // 2 + 1, 0].mean(),
        seen[shape[0] // 2 - 1 :, :, 1][:2].mean(),
    )
    assert middle == pytest.approx(((size[0] - 1) / 2, (size[1] - 1) / 2), abs=1)
    assert seen[..., 0].min() == pytest.approx(left, abs=2) and seen[..., 1].max() == pytest.approx(
        bottom, abs=2
    )


def test_a_picture_of_its_buckets_shape_stays_as_it_is():
    whole = picture(0, (64, 32))
    assert fit(whole, (32, 64)) is whole


def test_a_step_has_one_shape_and_as_many_samples_as_fill_the_tokens():
    batches = toy({(8, 8): 30, (4, 8): 30, (4, 4): 30}, tokens=64)  # 16, 8 and 4 tokens each
    for step in range(100):
        batch = batches.batch(step)
        assert {sample["is"] for sample in batch} == {batches.shape(step)} == {s["shape"] for s in batch}
        assert len(batch) == batches.size(step) == {(8, 8): 4, (4, 8): 8, (4, 4): 16}[batches.shape(step)]
    assert {batches.shape(step) for step in range(20)} == {(8, 8), (4, 8), (4, 4)}


def test_no_sample_is_lost_and_passes_follow_each_other():
    batches = toy({(8, 8): 13, (4, 8): 30, (4, 4): 51}, tokens=64)
    steps = next(step for step in range(10**4) if batches.epoch(step) == 12)
    seen = {shape: [] for shape in [(8, 8), (4, 8), (4, 4)]}
    for step in range(steps):
        seen[batches.shape(step)] += batches.batch(step)
    for shape, many in (((8, 8), 13), ((4, 8), 30), ((4, 4), 51)):
        keys = [sample["key"] for sample in seen[shape]]
        passes = [keys[k : k + many] for k in range(0, len(keys) - many + 1, many)]
        assert all(len(set(one)) == many for one in passes)
        size = {(8, 8): 4, (4, 8): 8, (4, 4): 16}[shape]
        assert 12 * many - size < len(keys) <= 12 * many  # what is left over comes first in the next epoch
        assert passes[0] != passes[1]
        draws = [sample["draw"] for sample in seen[shape]]
        assert len(set(draws)) == len(draws)


def test_shapes_are_mixed_within_an_epoch():
    batches = toy({(8, 8): 200, (4, 8): 400})
    shapes = [batches.shape(step) for step in range(100)]
    runs = 1 + sum(a != b for a, b in zip(shapes, shapes[1:], strict=False))
    assert runs > 20 and shapes != [batches.shape(step) for step in range(300, 400)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("weights", [None, "some"])
def test_ranks_share_each_step_and_any_step_is_reached_at_once(world, weights):
    counts = {(8, 8): 40, (4, 8): 31, (4, 4): 17}
    given = None if weights is None else np.random.default_rng(1).random(88) * 2
    whole = toy(counts, batch_size=4, weights=given, tokens=128)
    late = {step: whole.batch(step) for step in (777, 5, 12345)}
    ranks = [toy(counts, batch_size=4, weights=given, tokens=128) for _ in range(world)]
    for rank, batches in enumerate(ranks):
        batches.split(rank, world)
    for step, batch in late.items():
        parts = [batches.batch(step) for batches in ranks]
        assert [sample for part in parts for sample in part] == batch
        assert len({len(part) for part in parts}) == 1
    stream = ranks[0].stream(777)
    assert next(stream) == late[777][: len(late[777]) // world]


def test_weights_tell_how_often_samples_come():
    weights = np.array([0.0, 0.5, 2.0] * 40)
    batches = toy({(8, 8): 70, (4, 8): 50}, weights=weights)
    steps = next(step for step in range(10**5) if batches.epoch(step) == 60)
    times = Counter(sample["key"] for step in range(steps) for sample in batches.batch(step))
    per_epoch = np.array([times[i] for i in range(120)]) / 60
    assert per_epoch[0::3].sum() == 0 and abs(per_epoch[2::3] - 2).max() < 0.1
    assert abs(per_epoch[1::3].mean() - 0.5) < 0.05


def test_a_lone_sample_has_its_own_small_and_rare_steps():
    batches = toy({(8, 8): 64, (4, 16): 1}, batch_size=2, tokens=64)
    steps = [step for step in range(200) if batches.shape(step) == (4, 16)]
    assert batches.size(steps[0]) == 2 and len({s["key"] for s in batches.batch(steps[0])}) == 1
    assert len(steps) == pytest.approx(200 / (64 / 4) / 2, abs=1)  # half a step an epoch


def test_the_fingerprint_tells_samples_shapes_tokens_and_weights_apart():
    counts = {(8, 8): 4, (4, 8): 6}
    same = {toy(counts, seed=seed).fingerprint for seed in (1, 2)}
    others = [toy({(8, 8): 5, (4, 8): 5}), toy(counts, tokens=64), toy(counts, weights=np.ones(10))]
    assert len(same) == 1 and len(same | {batches.fingerprint for batches in others}) == 4


def test_bad_settings_name_their_key():
    with pytest.raises(
        ValueError, match=r"tokens=32 does not hold 8 pictures of 8x8, 16 tokens each: take 128"
    ):
        toy({(8, 8): 9}, batch_size=8)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        toy({(8, 8): 9}).split(0, 3)
    for key, value in (("tokens", 0), ("patch", 0), ("sides", []), ("sides", [32])):
        with pytest.raises(ValueError, match=f"data.buckets.{key}"):
            BucketConfig(**{key: value})
    assert pictures_of((256, 256), BucketConfig(tokens=3000), 2) == 10


def test_the_config_takes_buckets_by_one_key():
    assert load_config(DataConfig).buckets is None
    cfg = load_config(DataConfig, None, ["buckets.tokens=512", "buckets.sides=[128,256]"])
    assert cfg.buckets == BucketConfig(tokens=512, sides=[128, 256])
    with pytest.raises(ConfigError, match="buckets.tokns"):
        load_config(DataConfig, None, ["buckets.tokns=512"])


@pytest.mark.parametrize("beside", ["parquet", "json", "header"])
def test_pictures_of_many_sizes_stream_from_tars(tmp_path, beside):
    write(tmp_path)
    expected = picture_batches(config(tmp_path), 2, seed=0)
    if beside != "parquet":
        [path.unlink() for path in tmp_path.glob("*.parquet")]
    batches = picture_batches(config(tmp_path), 2, seed=0)
    if beside == "header":
        dataset = ShardDataset(tmp_path, split="train")
        assert [dataset._picture_size(i) for i in range(50)] == [
            tuple(size) for size in dataset.sizes().tolist()
        ]
    shapes = set()
    for step in range(30):
        batch, same = batches.batch(step), expected.batch(step)
        assert torch.equal(batch["picture"], same["picture"]) and batch["key"] == same["key"]
        rows, columns = batches.shape(step)
        assert batch["picture"].shape == (len(batch["key"]), 4, rows, columns)
        assert len(batch["key"]) == 256 // (rows * columns // 16) // 2 * 2 and batch["crop"].shape[1] == 4
        for key, (left, top, right, bottom) in zip(batch["key"], batch["crop"].tolist(), strict=True):
            width, height = SIZES[int(key[1:]) % 5]
            assert left + right == pytest.approx(width) and top + bottom == pytest.approx(height)
            assert (right - left) / (bottom - top) == pytest.approx(columns / rows)
        shapes.add((rows, columns))
    assert {(32, 32), (24, 40), (40, 24)} <= shapes


def test_judges_get_pictures_of_the_commonest_shape(tmp_path):
    dataset = ShardDataset(write(tmp_path), split="train")
    samples = fixed_samples(dataset, 5, config(tmp_path).buckets)
    assert len({sample["shape"] for sample in samples}) == 1 and len({s["key"] for s in samples}) == 5


def test_latents_are_grouped_by_the_shape_they_are_stored_in(tmp_path):
    shapes = [(4, 8, 8), (4, 4, 8), (4, 8, 4)]
    with ShardWriter(tmp_path, samples_per_shard=20) as writer:
        for i in range(48):
            latent = torch.full(shapes[i % 3], float(i), dtype=torch.float16)
            meta = {"vae": "abc", "split": "train"}
            writer.write_members(f"k{i}", {"safetensors": save({"latent": latent})}, f"number {i}", meta)
    cfg = config(tmp_path, tokens=64, patch=2)  # 16 or 8 tokens each
    batches = latent_batches(cfg, "abc", 2, seed=0)
    seen = Counter()
    steps = next(step for step in range(1000) if batches.epoch(step) == 1)
    for step in range(steps):
        batch = batches.batch(step)
        assert tuple(batch["latent"].shape[2:]) == batches.shape(step)
        assert [int(key[1:]) for key in batch["key"]] == batch["latent"][:, 0, 0, 0].int().tolist()
        seen.update(batch["key"])
    assert len(seen) == 48 and set(seen.values()) == {1}
    dataset = batches.dataset
    assert collate_latents(fixed_samples(dataset, 4, cfg.buckets))["latent"].shape[0] == 4
    with pytest.raises(ValueError, match="differ in shape.*data.buckets"):
        latent_batches(DataConfig(shards=str(tmp_path)), "abc", 8, seed=0).batch(0)


def test_the_trainer_takes_steps_of_many_sizes(tmp_path):
    """Real pictures of three shapes through the real autoencoder and trainer, stopped and gone on."""
    import json

    from diffusionfm.autoencoder import AutoencoderKL
    from diffusionfm.objectives import Reconstruction
    from diffusionfm.trainer import Trainer, TrainerConfig

    shards = write(tmp_path / "shards", count=90)
    for folder, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            torch.manual_seed(0)
            vae = AutoencoderKL(
                latent_channels=4, widths=(8, 8, 16), encoder_depths=(1, 1), decoder_depths=(1, 1, 1)
            )
            settings = {"steps": steps, "batch_size": 2, "device": "cpu", "decay_fraction": 0.0, "warmup": 1}
            cfg = TrainerConfig(output_dir=str(tmp_path / folder), **settings)
            data = picture_batches(config(shards, tokens=360), cfg.batch_size, seed=0)
            Trainer(cfg, Reconstruction(vae), data).fit()
    lines = [
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("whole", "parts")
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert lines[0][-1]["samples"] == sum(data.size(step) for step in range(4))
    assert len({data.size(step) for step in range(4)}) > 1
