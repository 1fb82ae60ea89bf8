from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data.ring import Ring

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


def rows(ring, start, stop):
    return [(run.shard, row) for run in ring.runs(start, stop) for row in range(run.start, run.stop)]


@given(SIZES, st.integers(0, 5), st.booleans(), st.lists(st.integers(0, 54), min_size=2, max_size=5))
@settings(max_examples=200)
def test_arcs_put_together_are_the_arc_around_them(sizes, epoch, shuffle, edges):
    ring = Ring(sizes, seed=3, epoch=epoch, shuffle=shuffle)
    edges = sorted(min(edge, sum(sizes)) for edge in edges)
    parts = [row for start, stop in pairwise(edges) for row in rows(ring, start, stop)]
    assert parts == rows(ring, edges[0], edges[-1])


@given(SIZES, st.integers(0, 5), st.booleans())
@settings(max_examples=200)
def test_the_whole_ring_is_every_row_once_and_each_shard_in_its_own_order(sizes, epoch, shuffle):
    around = rows(Ring(sizes, seed=3, epoch=epoch, shuffle=shuffle), 0, sum(sizes))
    every = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(around) == every
    for (shard, before), (next_shard, after) in pairwise(around):
        assert shard != next_shard or after == (before + 1) % sizes[shard]
    if not shuffle:
        assert around == every


def test_runs_are_never_empty():
    assert all(run.start < run.stop for run in Ring([0, 3, 0, 0, 2], seed=0, epoch=1, shuffle=True).runs(0, 5))


def test_the_beginning_and_the_order_of_the_shards_change_with_epoch_and_seed():
    rings = [Ring([10] * 10, seed=seed, epoch=epoch, shuffle=True) for seed in range(5) for epoch in range(20)]
    around = [rows(ring, 0, 100) for ring in rings]
    assert len({first[0] for first in around}) > 50
    assert len({tuple(dict.fromkeys(shard for shard, _ in one[10:])) for one in around}) > 95
