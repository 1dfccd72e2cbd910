"""The training order: exact permutations, the same stream at any number of ranks and after any resume."""

from collections import Counter

import numpy as np
import pytest

from diffusionfm.data.order import STRETCH, Batches, Order, draw, draw_all
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.shards import ShardWriter


def test_every_epoch_is_another_permutation():
    order = Order(101, seed=3)
    epochs = [[order.index(e, p) for p in range(101)] for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[1] == Order(101, seed=3).epoch(1).tolist() != Order(101, seed=4).epoch(1).tolist()


def test_the_order_is_fixed_for_good():
    """Recorded: a changed order would silently break the resume of runs already begun."""
    assert Order(10, seed=0).epoch(0).tolist() == [2, 0, 4, 9, 3, 8, 1, 7, 5, 6]
    assert draw(1, 2, np.arange(2)).dtype == np.uint64


@pytest.mark.parametrize("weights", [None, "some"])
def test_a_look_into_the_middle_is_the_middle_of_the_sorted_whole(weights):
    """Epochs of several stretches, against a plain sort of all draws."""
    n = 3 * STRETCH + 17
    given = None if weights is None else np.random.default_rng(0).random(n) * 2
    order = Order(n, 4, given)
    pool = np.arange(n)
    if given is not None:
        chance = (draw(4, 2, pool, purpose=1) >> np.uint64(11)) * 2.0**-53
        pool = np.repeat(pool, np.floor(given).astype(int) + (chance < given % 1))
    whole = pool[np.argsort(draw(4, 2, np.arange(len(pool))), kind="stable")]
    assert order.length(2) == len(whole)
    for start, stop in (
        (0, 1),
        (STRETCH - 500, STRETCH + 500),
        (7, 2 * STRETCH),
        (len(whole) - 3, len(whole) + 9),
    ):
        assert np.array_equal(order.part(2, start, stop), whole[start:stop])
    assert np.array_equal(order.epoch(2), whole) and order.index(2, 70000) == whole[70000]


def test_draws_are_all_different():
    """The order rests on it: equal draws would leave the sort a choice."""
    bits = draw_all(5, 6, 10**6)
    assert len(np.unique(bits)) == 10**6 and np.array_equal(
        bits[70000:70010], draw(5, 6, np.arange(70000, 70010))
    )


def test_draws_are_uniform_and_seeds_and_epochs_unrelated():
    a, b, c = (draw(s, e, np.arange(20000)) / 2.0**64 for s, e in ((0, 0), (0, 1), (1, 0)))
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef([a, b, c]) - np.eye(3)).max() < 0.03
    first = np.stack([Order(8, seed).epoch(0) for seed in range(2000)])
    counts = np.stack([np.bincount(column, minlength=8) for column in first.T])
    assert counts.min() > 180 and counts.max() < 325  # 250 expected, five standard deviations


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_stream_is_the_same_at_any_number_of_ranks(world):
    ranks = [Batches(range(10), list, batch_size=4, seed=7, rank=r, world=world) for r in range(world)]
    stream = [i for step in range(25) for rank in ranks for i in rank.batch(step)]
    assert stream == Order(10, seed=7).take(0, 100)
    for epoch in range(10):  # batches of 4 cross the borders of epochs of 10
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert [ranks[0].epoch(step) for step in (0, 2, 3, 24)] == [0, 0, 1, 9]


def test_a_batch_may_hold_many_epochs():
    assert Counter(Batches(range(3), list, batch_size=12, seed=0).batch(5)) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_streams_resume_where_they_stopped(workers):
    batches = Batches(range(50), list, batch_size=8, seed=1, workers=workers)
    stream = batches.stream()
    whole = [next(stream) for _ in range(12)]
    stream.close()
    resumed = Batches(range(50), list, batch_size=8, seed=1, workers=workers).stream(5)
    assert [next(resumed) for _ in range(7)] == whole[5:]
    resumed.close()


def test_a_stream_hands_on_errors():
    def collate(samples):
        raise ValueError("bad collate")

    with pytest.raises(ValueError, match="bad collate"):
        next(Batches(range(5), collate, batch_size=2, seed=0).stream())


def test_samples_get_their_own_draw_whatever_the_world():
    data = [{"key": i} for i in range(6)]
    whole = Batches(data, list, batch_size=4, seed=0)
    halves = [Batches(data, list, batch_size=4, seed=0, rank=r, world=2) for r in (0, 1)]
    assert whole.batch(9) == halves[0].batch(9) + halves[1].batch(9)
    draws = [sample["draw"] for step in range(20) for sample in whole.batch(step)]
    assert len(set(draws)) == 80 and "draw" not in data[0]


def test_weights_repeat_whole_and_by_chance():
    weights = [0, 1, 2.5, 0.25]
    order = Order(4, seed=5, weights=weights)
    counts = Counter()
    for epoch in range(400):
        now = Counter(order.epoch(epoch).tolist())
        assert now[0] == 0 and now[1] == 1 and now[2] in (2, 3) and now[3] in (0, 1)
        assert now.total() == order.length(epoch)
        counts += now
    assert abs(counts[2] / 400 - 2.5) < 0.1 and abs(counts[3] / 400 - 0.25) < 0.1


def test_weighted_streams_resume_and_split_too():
    weights = [0.5] * 10 + [2.0] * 5
    late = Batches(range(15), list, batch_size=4, seed=2, weights=weights).batch(300)
    halves = [Batches(range(15), list, 4, 2, rank=r, world=2, weights=weights) for r in (0, 1)]
    early = [i for step in range(301) for half in halves for i in half.batch(step)]
    assert late == early[-4:]
    order, epochs = Order(15, 2, weights), []
    while len(epochs) < len(early):
        epochs += order.epoch(order.locate(len(epochs))[0]).tolist()
    assert early == epochs[: len(early)]


def test_more_ranks_than_samples():
    """Two samples on four ranks, one of a batch each: each sample comes as often as the other, none is lost."""
    ranks = [Batches(range(2), list, batch_size=4, seed=0, rank=r, world=4) for r in range(4)]
    for step in range(5):
        assert Counter(i for rank in ranks for i in rank.batch(step)) == {0: 2, 1: 2}


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 3])
def test_no_sample_repeats_or_is_lost_with_fewer_shards_than_workers(tmp_path, workers, world, shards):
    with ShardWriter(tmp_path, samples_per_shard=-(-12 // shards)) as writer:
        for i in range(12):
            writer.write_members(f"k{i}", {"safetensors": bytes([i])}, f"number {i}", {"split": "train"})
    streams = []
    for rank in range(world):
        dataset = ShardDataset(tmp_path, split="train", needs=("safetensors", "txt"))
        batches = Batches(dataset, list, batch_size=4, seed=0, workers=workers)
        batches.split(rank, world)
        streams.append(batches.stream())
    assert len(dataset.paths) == shards
    for _ in range(4):  # epochs, of three steps
        keys = [sample["key"] for _ in range(3) for stream in streams for sample in next(stream)]
        assert sorted(keys) == sorted(f"k{i}" for i in range(12))
    for stream in streams:
        stream.close()


def test_fingerprints_of_data_without_one_tell_how_many_samples():
    prints = [
        Batches(range(n), list, batch_size=2, seed=seed).fingerprint for n, seed in ((5, 0), (5, 1), (6, 0))
    ]
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 64


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [float("nan"), 1, 1], [0.1, 0.1, 0.1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        Order(3, 0, weights)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 3, "world": 2}, {"batch_size": 2, "rank": 1}]
)
def test_bad_batches(options):
    with pytest.raises(ValueError):
        Batches(range(9), list, seed=0, **options)
