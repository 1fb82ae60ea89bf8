import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import pytest
from data.shard_files import contents, count_reads, num_bytes, samples, write_parquet, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data import parquet_shards, tar_shards
from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.stream_order import StreamBatchSampler
from e2mc_hf.errors import UsageError


@dataclass
class ListShard:
    """A shard in memory that keeps which of its rows were read."""

    images: list[bytes | None]
    reads: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        for row in range(start, stop):
            self.reads.append(row)
            yield self.images[row]


def image(sample_id):
    return f"image {sample_id}".encode()


def stream(sizes):
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    shards = [ListShard([image(start + row) for row in range(size)]) for start, size in zip(starts, sizes, strict=True)]
    return StreamSource(shards, "image", "tiny", None)


def reads(source):
    """Sample ids of all rows read, in no order."""
    return sorted(
        start + row for start, shard in zip(source.offsets, source.shards, strict=False) for row in shard.reads
    )


def orders(source, batch_size, world_size, **options):
    """The order of every rank."""
    return [
        StreamBatchSampler(source, batch_size, rank=rank, world_size=world_size, **{"seed": 0, **options})
        for rank in range(world_size)
    ]


def ids(batches):
    return [[row.sample_id for row in batch] for batch in batches]


def all_batches(source, batch_size, world_size, epoch=0, **options):
    """The batches of every rank."""
    ranks = orders(source, batch_size, world_size, **options)
    for order in ranks:
        order.set_epoch(epoch)
    return [list(order) for order in ranks]


@st.composite
def cases(draw):
    """Shards, some empty, with at least one global batch; lanes that two numbers of processes can divide."""
    world_size, batch_size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    lanes = draw(st.sampled_from([n for n in range(world_size, 31, world_size) if world_size * batch_size % n == 0]))
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=7))
    sizes[-1] += max(0, world_size * batch_size - sum(sizes))
    options = {
        "lanes": lanes,
        "shuffle_window": draw(st.integers(1, 40)),
        "shuffle": draw(st.booleans()),
        "epoch": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 2**40)),
    }
    return sizes, batch_size, world_size, options


@given(cases())
@settings(max_examples=150)
def test_an_epoch_is_every_image_once_in_full_batches_of_equal_number_on_every_process(case):
    sizes, batch_size, world_size, options = case
    source = stream(sizes)
    ranks = all_batches(source, batch_size, world_size, **options)
    seen = [row for batches in ranks for batch in batches for row in batch]
    steps = sum(sizes) // (batch_size * world_size)
    assert [len(batches) for batches in ranks] == [steps] * world_size
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    assert len({row.sample_id for row in seen}) == len(seen) == sum(sizes) - sum(sizes) % (batch_size * world_size)
    assert all(row.encoded == image(row.sample_id) and row.epoch == options["epoch"] for row in seen)
    assert reads(source) == sorted(row.sample_id for row in seen)  # each image by one process, once


@given(cases())
@settings(max_examples=100)
def test_global_batches_do_not_depend_on_the_number_of_processes(case):
    sizes, batch_size, world_size, options = case
    ranks = all_batches(stream(sizes), batch_size, world_size, **options)
    (alone,) = all_batches(stream(sizes), batch_size * world_size, 1, **options)
    assert alone == [list(chain(*batches)) for batches in zip(*ranks, strict=True)]  # spares included


@given(cases(), st.data())
@settings(max_examples=150)
def test_skipping_gives_the_rest_of_the_epoch_once_and_reads_at_most_one_block_of_a_lane_again(case, data):
    sizes, batch_size, world_size, options = case
    epoch = options.pop("epoch")
    whole = all_batches(stream(sizes), batch_size, world_size, epoch, **options)
    for rank, batches in enumerate(whole):
        source = stream(sizes)
        order = orders(source, batch_size, world_size, **options)[rank]
        order.set_epoch(epoch)
        num_skipped = data.draw(st.integers(0, len(order)))
        order.skip(num_skipped)
        assert list(order) == batches[num_skipped:]
        again = len(reads(source)) - batch_size * (len(order) - num_skipped)
        lanes = order.lanes // world_size
        assert 0 <= again < lanes * max(options["shuffle_window"], 2 * (batch_size // lanes + 4))
        assert len(order) == len(batches)
        assert list(order) == batches  # the iteration after that is whole


@given(cases())
@settings(max_examples=150)
def test_the_rows_of_a_lane_in_a_batch_share_spares_that_are_none_of_them(case):
    sizes, batch_size, world_size, options = case
    for batches in all_batches(stream(sizes), batch_size, world_size, **options):
        size = batch_size * world_size // options["lanes"]
        for chunk in (batch[start : start + size] for batch in batches for start in range(0, batch_size, size)):
            spares = chunk[0].spares
            assert all(row.spares is spares for row in chunk)
            assert len({spare.sample_id for spare in spares}) == len(spares) > 0
            assert all(spare.encoded == image(spare.sample_id) and spare.spares == () for spare in spares)
            assert {spare.epoch for spare in spares} == {options["epoch"]}
            if len(batches) > 1:
                assert {spare.sample_id for spare in spares} & {row.sample_id for row in chunk} == set()
                assert len(spares) == min(4, size * len(batches) - size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [[1, 7, 30], [0, 0, 40, 0], [40], [1] * 41, [30, 7, 1, 0]])
def test_uneven_shards_fewer_than_processes_and_empty_ones_lose_less_than_a_batch(sizes, world_size):
    ranks = all_batches(stream(sizes), 2, world_size)
    seen = [row.sample_id for batches in ranks for batch in batches for row in batch]
    assert len({len(batches) for batches in ranks}) == 1
    assert sum(sizes) - len(seen) == orders(stream(sizes), 2, world_size)[0].num_dropped < 2 * world_size
    assert len(set(seen)) == len(seen)


def test_the_images_left_out_are_others_in_every_epoch():
    source = stream([10, 11])
    left_out = []
    for epoch in range(100):
        (batches,) = all_batches(source, 6, 1, epoch)
        left_out.append(frozenset(range(21)) - {row.sample_id for batch in batches for row in batch})
    assert {len(ids) for ids in left_out} == {3}
    assert len(set(left_out)) > 15
    assert frozenset().union(*left_out) == frozenset(range(21))


def test_epoch_and_seed_change_the_order():
    source = stream([20, 20])
    drawn = [ids(*all_batches(source, 5, 1, epoch, seed=seed)) for epoch in range(3) for seed in range(3)]
    assert len({str(batches) for batches in drawn}) == 9


def test_the_window_is_what_is_shuffled_together():
    source = stream([1000])
    spreads = []
    for window in (10, 100, 1000):
        (batches,) = (ids(*all_batches(source, 4, 1, shuffle_window=window)),)
        first = batches[0][0]
        places = [(sample_id - first) % 1000 for batch in batches[:2] for sample_id in batch]
        spreads.append(max(min(place, 1000 - place) for place in places))
    assert spreads[0] < 10 <= spreads[1] < 100 <= spreads[2]


def test_no_two_blocks_are_shuffled_alike():
    batches = ids(*all_batches(stream([400]), 8, 1, lanes=2, shuffle_window=20))
    lanes = [[row for batch in batches for row in batch[start : start + 4]] for start in (0, 4)]
    blocks = [lane[start : start + 20] for lane in lanes for start in range(0, 200, 20)]
    whole = [block for block in blocks if max(block) - min(block) == 19]  # one may lie across the dataset's end
    assert len({tuple(row - min(block) for row in block) for block in whole}) == len(whole) >= 19


def test_every_image_is_as_likely_anywhere_in_the_epoch():
    source = stream([8, 8, 8])
    firsts = [ids(*all_batches(source, 4, 1, epoch, shuffle_window=8))[0][0] for epoch in range(600)]
    counts = [firsts.count(sample_id) for sample_id in range(24)]
    assert min(counts) > 5  # 25 expected, standard deviation 5
    assert max(counts) < 50


def test_without_shuffle_the_order_is_the_datasets_own_lane_by_lane():
    (alone,) = all_batches(stream([3, 0, 5]), 4, 1, shuffle=False, epoch=2)
    assert ids(alone) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [ids(batches) for batches in all_batches(stream([3, 0, 5]), 2, 2, shuffle=False)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]


def test_spares_are_sent_once_a_batch():
    source = StreamSource([ListShard(contents(200, size=1000))], "image", "tiny", None)
    ((batch, *_),) = all_batches(source, 32, 1)
    assert len(pickle.dumps(batch)) < (32 + 4) * 1100


def test_a_missing_image_is_a_row_without_bytes():
    source = StreamSource([ListShard([b"a", None])], "image", "tiny", None)
    ((batch,),) = all_batches(source, 2, 1, shuffle=False)
    assert [row.encoded for row in batch] == [b"a", b""]


def test_the_epoch_and_the_skip_are_those_of_when_the_iteration_began():
    order = orders(stream([20]), 4, 1)[0]
    whole = list(order)
    order.skip(2)
    batches = iter(order)
    order.set_epoch(7)
    order.skip(1)
    assert list(batches) == whole[2:]
    assert len(list(order)) == 4


def test_more_batches_than_an_epoch_has_cannot_be_skipped():
    with pytest.raises(ValueError, match=r"`num_batches` must be in 0\.\.5, .* got 6"):
        orders(stream([20]), 4, 1)[0].skip(6)


def test_an_error_of_a_shard_is_raised_to_the_trainer_and_no_thread_stays(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, contents(100, size=1000), row_group_size=10, compression="none", use_dictionary=False)
    source = StreamSource(open_shards([str(file)], "parquet", "image"), "image", "tiny", None)
    content = bytearray(file.read_bytes())
    content[30_000:45_000] = bytes(15_000)
    file.write_bytes(content)
    with pytest.raises(UsageError, match="whole parquet files"):
        list(orders(source, 4, 1, lanes=2, shuffle_window=20)[0])
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"] == []


def test_a_trainer_that_stops_early_leaves_no_thread():
    batches = iter(orders(stream([1000]), 4, 1, lanes=4, shuffle_window=10)[0])
    next(batches)
    assert len([thread for thread in threading.enumerate() if thread.name == "read-ahead"]) == 4
    batches.close()
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"] == []


WINDOW, ROW_GROUP, BYTES, FOOTER = 50, 20, 10_000, 2**16


@pytest.mark.parametrize("num_skipped", [0, 1, 13, 37, 62, 63])
def test_resuming_on_parquet_reads_again_at_most_a_window_and_a_row_group(tmp_path, monkeypatch, num_skipped):
    images = contents(1009, size=BYTES)
    parts = [images[:400], images[400:407], [], images[407:]]
    files = [
        write_parquet(
            tmp_path / f"{n}.parquet", part, ROW_GROUP, compression="none", use_dictionary=False, write_statistics=False
        )
        for n, part in enumerate(parts)
    ]
    source = StreamSource(open_shards(files, "parquet", "image"), "image", "tiny", None)
    ranges = count_reads(monkeypatch, parquet_shards)
    order = orders(source, 8, 2, shuffle_window=WINDOW)[1]
    order.skip(num_skipped)
    assert len(list(order)) == 63 - num_skipped
    due = (63 - num_skipped) * 8
    # What is due, the begun block, the rest of the row groups at both ends of the lane, at most four footers.
    assert num_bytes(ranges) <= 1.02 * BYTES * (due + WINDOW + 2 * ROW_GROUP) + 4 * FOOTER
    if num_skipped == 63:
        assert ranges == []


@pytest.mark.parametrize("num_skipped", [0, 1, 13, 37, 62, 63])
def test_resuming_on_tar_reads_again_at_most_a_window(tmp_path, monkeypatch, num_skipped):
    images = contents(1009, size=BYTES)
    files = [write_tar(tmp_path / f"{n}.tar", samples(part)) for n, part in enumerate((images[:400], images[400:]))]
    source = StreamSource(open_shards(files, "webdataset", "jpg"), "jpg", "tiny", None)
    ranges = count_reads(monkeypatch, tar_shards)
    order = orders(source, 8, 2, shuffle_window=WINDOW)[1]
    whole = list(order)
    assert num_bytes(ranges) == sum(len(row.encoded) for batch in whole for row in batch) == 63 * 8 * (BYTES + 2)
    ranges.clear()
    order.skip(num_skipped)
    assert list(order) == whole[num_skipped:]
    assert num_bytes(ranges) <= (BYTES + 2) * ((63 - num_skipped) * 8 + WINDOW)


def test_real_photographs_all_arrive_once(photo_folder):
    files = [str(file) for file in sorted(photo_folder.glob("validation*"))]
    source = StreamSource(open_shards(files, "parquet", "image"), "image", "imagenette160", None, "validation")
    plain = list(source.shards[0].read(0, source.shards[0].rows))
    ranks = all_batches(source, 32, 2, lanes=4, shuffle_window=300)
    seen = [row for batches in ranks for batch in batches for row in batch]
    assert len(seen) == len({row.sample_id for row in seen}) == 3925 - 3925 % 64
    assert all(row.encoded == plain[row.sample_id] for row in seen)


@pytest.mark.parametrize(("world_size", "lanes"), [(2, 3), (2, 1), (1, 0), (2, 16), (1, 3)])
def test_lanes_that_cannot_be_divided_are_refused(world_size, lanes):
    with pytest.raises(UsageError, match=rf"`lanes` must be a multiple of the {world_size} .* got {lanes}\."):
        orders(stream([100]), 4, world_size, lanes=lanes)


@pytest.mark.parametrize("sizes", [[9], [0], []])
def test_fewer_images_than_one_global_batch_are_refused(sizes):
    with pytest.raises(UsageError, match=rf"must not exceed the {sum(sizes)} images, got 5 x 2 = 10\."):
        orders(stream(sizes), 5, 2)
