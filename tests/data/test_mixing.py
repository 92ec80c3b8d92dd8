"""Mixing: proportions, order as a pure function of seed and epoch, and shards that cover everything."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molora.data.mixing import epoch_order, mixing_counts, shard
from molora.errors import ConfigError

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def drawn_per_task(sizes, order):
    ends = torch.tensor(sizes).cumsum(0)
    return torch.bucketize(order, ends, right=True).bincount(minlength=len(sizes)).tolist()


@given(SIZES, st.integers(0, 5), st.integers(0, 5))
def test_by_size_every_record_comes_once(sizes, seed, epoch):
    counts = mixing_counts(sizes, "size")
    assert counts == sizes
    assert epoch_order(sizes, counts, seed, epoch).sort().values.tolist() == list(range(sum(sizes)))


def test_equal_and_temperature_proportions():
    sizes = [900, 90, 10]
    assert mixing_counts(sizes, "equal") == [334, 333, 333]
    counts = mixing_counts(sizes, "temperature", temperature=2.0)
    roots = [n**0.5 for n in sizes]
    assert all(abs(count - 1000 * root / sum(roots)) < 1 for count, root in zip(counts, roots, strict=True))
    assert sum(counts) == 1000
    assert mixing_counts(sizes, "temperature", temperature=1.0) == sizes
    assert mixing_counts(sizes, "temperature", temperature=1e9) == mixing_counts(sizes, "equal")
    assert mixing_counts([100, 100], "size", weights=[3.0, 1.0]) == [150, 50]
    assert mixing_counts([10_000, 1], "size", weights=[1.0, 1e-6])[1] == 1


@given(SIZES, st.sampled_from(["equal", "temperature"]), st.integers(0, 3))
def test_an_epoch_holds_the_counts_and_repeats_evenly(sizes, mixing, epoch):
    counts = mixing_counts(sizes, mixing)
    order = epoch_order(sizes, counts, 0, epoch)
    assert drawn_per_task(sizes, order) == counts
    times, start = Counter(order.tolist()), 0
    for size, count in zip(sizes, counts, strict=True):
        often = [times[i] for i in range(start, start + size)]
        assert min(often) == count // size and max(often) == -(-count // size)
        start += size


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return epoch_order([40, 60], [40, 60], seed, epoch).tolist()

    before = torch.get_rng_state()
    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 40), st.integers(1, 7))
def test_shards_cover_the_order_and_are_equally_long(size, world):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    shards = [shard(order, rank, world).tolist() for rank in range(world)]
    assert {len(part) for part in shards} == {-(-size // world)}
    together = Counter(index for part in shards for index in part)
    assert set(together) == set(range(size))
    assert sum(together.values()) - size < world


def test_unknown_mixing_names_the_known():
    with pytest.raises(ConfigError, match="size, equal, temperature"):
        mixing_counts([1], "sqrt")
    with pytest.raises(ConfigError, match="more than 0"):
        mixing_counts([1], "temperature", temperature=0.0)
