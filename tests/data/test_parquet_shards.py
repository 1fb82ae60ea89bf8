import io
import pickle
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.shard_files import IMAGE_TYPE, contents, count_reads, num_bytes, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data import parquet_shards
from e2mc_hf.data.parquet_shards import open_parquet
from e2mc_hf.errors import UsageError


def write_column(path, column):
    pq.write_table(pa.table({"image": column}), path)
    return str(path)


def rows_of_datasets(file):
    """The rows as `load_dataset` streams them."""
    rows = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
    return [row["image"]["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False))]


@pytest.fixture(scope="module")
def file_of_thirty(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("thirty") / "train.parquet", contents(30), row_group_size=7)


def test_rows_are_those_of_datasets(file_of_thirty):
    shard = open_parquet(file_of_thirty, "image")
    assert (shard.rows, shard.row_groups) == (30, (7, 7, 7, 7, 2))
    assert list(shard.read(0, 30)) == rows_of_datasets(file_of_thirty) == contents(30)


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=100)
def test_any_range_of_rows_can_be_read(file_of_thirty, start, stop):
    assert list(open_parquet(file_of_thirty, "image").read(start, stop)) == contents(30)[start:stop]


def test_any_range_of_rows_of_a_group_decoded_in_several_parts_can_be_read(file_of_thirty, monkeypatch):
    monkeypatch.setattr(parquet_shards, "_ROWS_AT_ONCE", 3)
    shard = open_parquet(file_of_thirty, "image")
    for start in range(0, 9):
        for stop in range(start, 16):
            assert list(shard.read(start, stop)) == contents(30)[start:stop]


def test_real_photographs_are_those_of_datasets(photo_folder):
    (file,) = photo_folder.glob("validation*")
    shard = open_parquet(str(file), "image")
    streamed = rows_of_datasets(str(file))
    assert shard.rows == len(streamed) == 3925
    assert all(own == other for own, other in zip(shard.read(0, 3925), streamed, strict=True))
    assert list(shard.read(1000, 1010)) == streamed[1000:1010]


def test_only_the_image_column_of_the_needed_row_groups_is_read(tmp_path, monkeypatch):
    images = contents(100, size=1000)
    labels = pa.array(["x" * 5000 + str(number) for number in range(100)])
    column = pa.array([{"bytes": image, "path": None} for image in images], type=IMAGE_TYPE)
    pq.write_table(
        pa.table({"text": labels, "image": column}),
        tmp_path / "x.parquet",
        row_group_size=10,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    ranges = count_reads(monkeypatch, parquet_shards)
    shard = open_parquet(str(tmp_path / "x.parquet"), "image")
    footer = num_bytes(ranges)
    ranges.clear()
    assert list(shard.read(25, 32)) == images[25:32]
    assert 20 * 1000 <= num_bytes(ranges) - footer < 21.5 * 1000


def test_row_groups_are_read_one_at_a_time(tmp_path, monkeypatch):
    images = contents(100, size=10_000)
    file = write_parquet(tmp_path / "x.parquet", images, row_group_size=10, compression="none", use_dictionary=False)
    ranges = count_reads(monkeypatch, parquet_shards)
    rows = open_parquet(file, "image").read(0, 100)
    for group in range(10):
        for row in range(10):
            assert next(rows) == images[group * 10 + row]
        assert max(stop for start, stop in ranges if start < 900_000) < (group + 1) * 101_000
    rows.close()


def test_files_are_read_by_no_thread_but_the_callers(tmp_path, monkeypatch):
    readers = set()

    class WatchedFile(io.FileIO):
        def read(self, size=-1, /):
            readers.add(threading.get_ident())
            return super().read(size)

    monkeypatch.setattr(parquet_shards, "open_file", WatchedFile)
    shard = open_parquet(write_parquet(tmp_path / "x.parquet", contents(20)), "image")
    assert list(shard.read(0, 20)) == contents(20)
    assert readers == {threading.get_ident()}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(50)])
def test_a_plain_binary_column_is_read(tmp_path, kind):
    images = contents(5, size=48)
    file = write_column(tmp_path / "x.parquet", pa.array([*images, None], type=kind))
    assert list(open_parquet(file, "image").read(0, 6)) == [*images, None]


def test_a_column_that_stores_each_image_once_is_read(tmp_path):
    images = contents(3)
    column = pa.array([*images, None, *images]).dictionary_encode()
    file = write_column(tmp_path / "x.parquet", column)
    assert pa.types.is_dictionary(pq.read_schema(file).field("image").type)
    assert list(open_parquet(file, "image").read(0, 7)) == [*images, None, *images]


def test_missing_images_are_none(tmp_path):
    values = [None, {"bytes": None, "path": None}, {"bytes": b"a", "path": None}]
    file = write_column(tmp_path / "x.parquet", pa.array(values, type=IMAGE_TYPE))
    assert list(open_parquet(file, "image").read(0, 3)) == [None, None, b"a"]


def test_a_path_without_bytes_is_relative_to_the_parquet_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"a")
    paths = ["images/a.jpg", "images/gone.jpg", "images", "images/a.jpg/b.jpg", str(tmp_path / "images" / "a.jpg")]
    values = pa.array([{"bytes": None, "path": path} for path in paths], type=IMAGE_TYPE)
    file = write_column(tmp_path / "x.parquet", values)
    assert list(open_parquet(file, "image").read(0, 5)) == [b"a", None, None, None, b"a"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/zero", "."])
def test_a_path_that_no_file_can_have_is_a_missing_image(tmp_path, path):
    values = pa.array([{"bytes": None, "path": path}, {"bytes": b"a", "path": None}], type=IMAGE_TYPE)
    file = write_column(tmp_path / "x.parquet", values)
    assert list(open_parquet(file, "image").read(0, 2)) == [None, b"a"]


def test_signatures_stay_out_of_messages(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "open_file", lambda url: io.BytesIO(b"broken"))
    with pytest.raises(UsageError, match=r"got 'https://x\.org/a\.parquet'") as caught:
        open_parquet("https://user:geheim@x.org/a.parquet?signature=geheim", "image")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "path", "expected"),
    [
        ("hf://datasets/a/b/data/x.parquet", "images/a.jpg", "hf://datasets/a/b/data/images/a.jpg"),
        ("hf://datasets/a/b/data/x.parquet", "https://there.org/a.jpg", "https://there.org/a.jpg"),
    ],
)
def test_a_path_in_a_remote_file_is_a_url(file, path, expected):
    assert parquet_shards._beside(file, path) == expected


def test_a_file_without_rows_is_an_empty_shard(tmp_path):
    shard = open_parquet(write_parquet(tmp_path / "x.parquet", []), "image")
    assert (shard.rows, list(shard.read(0, 0))) == (0, [])


def test_a_shard_travels_without_an_open_file(file_of_thirty):
    shard = open_parquet(file_of_thirty, "image")
    rows = shard.read(0, 30)
    next(rows)
    copy = pickle.loads(pickle.dumps(shard))
    assert copy == shard
    assert list(copy.read(0, 30)) == contents(30)
    rows.close()


@pytest.mark.parametrize(("column", "kind"), [("label", "int64"), ("photo", "None")])
def test_a_column_without_images_is_refused(file_of_thirty, column, kind):
    with pytest.raises(UsageError, match=rf"`image_column` .* got '{column}' of type {kind} in .*: label, image\."):
        open_parquet(file_of_thirty, column)


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1 PAR1"])
def test_a_file_that_is_no_parquet_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=r"`dataset` must be made of whole parquet files, got .*x\.parquet") as caught:
        open_parquet(str(tmp_path / "x.parquet"), "image")
    assert "\n" not in str(caught.value)


def test_a_damaged_page_is_named_when_it_is_read(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, contents(100, size=1000), row_group_size=10, compression="none", use_dictionary=False)
    shard = open_parquet(str(file), "image")
    content = bytearray(file.read_bytes())
    content[30_000:45_000] = bytes(15_000)
    file.write_bytes(content)
    rows = shard.read(0, 100)
    assert [next(rows) for _ in range(20)] == contents(20, size=1000)
    with pytest.raises(UsageError, match="`dataset` must be made of whole parquet files"):
        list(rows)


def test_a_file_that_is_gone_is_not_called_broken(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_parquet(str(tmp_path / "x.parquet"), "image")
