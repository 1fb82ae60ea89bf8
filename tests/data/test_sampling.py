from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data.rows import Row
from e2mc_hf.data.sampling import GlobalBatchSampler
from e2mc_hf.errors import UsageError


def batches(num_samples, batch_size, world_size=1, epoch=0, seed=0, shuffle=True):
    """The batches of every rank."""
    samplers = [
        GlobalBatchSampler(num_samples, batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def ids(batch):
    return [row.sample_id for row in batch]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 30), st.integers(0, 3))
@settings(deadline=None, database=None, max_examples=50)
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size, batch_size, surplus, epoch):
    num_samples = world_size * batch_size + surplus
    (alone,) = batches(num_samples, world_size * batch_size, epoch=epoch)
    ranks = batches(num_samples, batch_size, world_size, epoch=epoch)
    assert alone == [list(chain(*slices)) for slices in zip(*ranks, strict=True)]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 30))
@settings(deadline=None, database=None, max_examples=50)
def test_an_epoch_covers_every_image_once_but_for_the_incomplete_batch(world_size, batch_size, surplus):
    global_size = world_size * batch_size
    num_samples = global_size + surplus
    seen = [index for rank in batches(num_samples, batch_size, world_size) for batch in rank for index in ids(batch)]
    assert len(seen) == len(set(seen)) == num_samples - num_samples % global_size
    assert set(seen) <= set(range(num_samples))


def test_the_epoch_changes_the_order_and_travels_with_the_index():
    (first,), (second,) = batches(20, 5, epoch=0), batches(20, 5, epoch=3)
    assert [ids(batch) for batch in first] != [ids(batch) for batch in second]
    assert {row.epoch for batch in second for row in batch} == {3}


def test_the_seed_changes_the_order():
    assert batches(20, 5, seed=0) != batches(20, 5, seed=1)


def test_without_shuffle_the_order_is_the_datasets_own():
    assert batches(6, 3, shuffle=False, epoch=2) == [
        [[Row(2, index) for index in ids] for ids in ([0, 1, 2], [3, 4, 5])]
    ]


def test_the_length_counts_complete_global_batches():
    assert len(GlobalBatchSampler(23, 2, rank=1, world_size=5, seed=0)) == 2


def test_what_an_epoch_leaves_out_is_counted():
    assert GlobalBatchSampler(23, 2, rank=1, world_size=5, seed=0).num_dropped == 3
    assert GlobalBatchSampler(20, 2, rank=1, world_size=5, seed=0).num_dropped == 0


@pytest.mark.parametrize("num_skipped", [0, 1, 4])
def test_skipping_gives_the_rest_of_the_epoch_once(num_skipped):
    order = GlobalBatchSampler(23, 5, rank=0, world_size=1, seed=0)
    whole = list(order)
    order.skip(num_skipped)
    assert list(order) == whole[num_skipped:]
    assert list(order) == whole
    assert len(order) == 4


@pytest.mark.parametrize("num_skipped", [-1, 5])
def test_more_batches_than_an_epoch_has_cannot_be_skipped(num_skipped):
    with pytest.raises(ValueError, match=rf"`num_batches` must be in 0\.\.4, .* got {num_skipped}"):
        GlobalBatchSampler(23, 5, rank=0, world_size=1, seed=0).skip(num_skipped)


def test_fewer_images_than_one_global_batch_are_refused_with_the_largest_size():
    with pytest.raises(
        UsageError, match=r"the 9 images, got 5 x 2 = 10\. Pass --per_device_train_batch_size 4 or less"
    ):
        GlobalBatchSampler(9, 5, rank=0, world_size=2, seed=0)


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(UsageError, match="Use fewer processes"):
        GlobalBatchSampler(1, 1, rank=0, world_size=2, seed=0)
