import pickle

import pytest
from data.shard_files import contents, write_parquet

from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource


@pytest.fixture
def source(tmp_path):
    files = [write_parquet(tmp_path / f"{n}.parquet", contents(rows)) for n, rows in enumerate((3, 0, 4))]
    return StreamSource(open_shards(files, "parquet", "image"), "image", "tiny", None)


def test_a_stream_counts_the_rows_of_all_shards(source):
    assert len(source) == 7


def test_sample_ids_run_on_from_shard_to_shard(source):
    assert source.offsets == (0, 3, 3, 7)


def test_a_stream_of_nothing_is_empty():
    assert len(StreamSource([], "image", "nothing", None)) == 0


def test_a_stream_travels(source):
    assert pickle.loads(pickle.dumps(source)) == source
