import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.shard_files import contents, samples, write_parquet, write_tar

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.resolving import find_files, open_stream, source_name, split_parts
from e2mc_hf.errors import UsageError

PHOTO, MASK, OTHER = contents(3)


def stream_of(folder, **options):
    return open_stream(DataArguments(dataset=str(folder), streaming=True, **options), "train")


def test_files_come_in_the_order_of_their_names(tmp_path):
    images = contents(12)
    for number in (10, 2, 0):
        write_parquet(tmp_path / f"train-{number:05}.parquet", images[number : number + 1])
    found = find_files(DataArguments(dataset=str(tmp_path)), "train")
    assert [path[-10:] for path in found.files] == [
        "-00000.parquet"[-10:],
        "-00002.parquet"[-10:],
        "-00010.parquet"[-10:],
    ]
    source = stream_of(tmp_path, image_column="image")
    assert [row for shard in source.shards for row in shard.read(0, shard.rows)] == [images[0], images[2], images[10]]


def test_the_image_of_a_tar_is_told_by_extension_whatever_else_is_in_the_sample(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            ("README", b"no sample"),
            ("n01/a.v2.json", b"{}"),
            ("n01/a.cls", b"1"),
            ("n01/a.JPEG", PHOTO),
            ("n02/a.png", MASK),
        ],
    )
    assert stream_of(tmp_path).image_column == "JPEG"


def test_hidden_members_before_the_first_sample_do_not_hide_its_columns(tmp_path):
    hidden = [("__meta.json", b"{}"), ("a/__index.txt", b""), ("._a.png", b"")]
    write_tar(tmp_path / "0.tar", [*hidden, ("a.jpg", PHOTO), ("a.cls", b"1")])
    assert stream_of(tmp_path).image_column == "jpg"


def test_a_compressed_tar_is_called_that(tmp_path):
    write_tar(tmp_path / "0.tar.gz", samples([PHOTO]), "w:gz")
    arguments = DataArguments(dataset="webdataset", data_files=str(tmp_path / "0.tar.gz"), streaming=True)
    with pytest.raises(UsageError, match=r"not compressed, got gzip in .*Leave out --streaming"):
        open_stream(arguments, "train")


@pytest.mark.parametrize("format", ["parquet", "webdataset", "imagefolder"])
def test_a_pattern_that_no_file_has_is_refused_as_that(tmp_path, format):
    arguments = DataArguments(dataset=format, data_files=str(tmp_path / "*.there"), streaming=True)
    with pytest.raises(FileNotFoundError, match="no such files"):
        find_files(arguments, "train")


def test_of_several_images_a_sample_one_must_be_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", PHOTO), ("a.seg.png", MASK), ("b.jpg", OTHER)])
    with pytest.raises(UsageError, match=r"got 2\. Pass one of .* jpg \(Image\), seg\.png \(Image\)"):
        stream_of(tmp_path)
    source = stream_of(tmp_path, image_column="seg.png")
    assert [list(shard.read(0, 2)) for shard in source.shards] == [[MASK, None]]


@pytest.mark.parametrize("named", [None, "txt"])
def test_a_tar_without_images_is_refused(tmp_path, named):
    write_tar(tmp_path / "0.tar", [("a.txt", b"text"), ("a.cls", b"1")])
    with pytest.raises(UsageError, match=r"`image_column` .* txt \(string\), cls \(string\)"):
        stream_of(tmp_path, image_column=named)


def test_plain_bytes_in_a_parquet_file_are_streamed_if_named(tmp_path):
    pq.write_table(pa.table({"jpeg": [PHOTO, OTHER], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"jpeg \(binary\)"):
        stream_of(tmp_path)
    (shard,) = stream_of(tmp_path, image_column="jpeg").shards
    assert list(shard.read(0, 2)) == [PHOTO, OTHER]


def test_files_named_one_by_one_are_streamed_in_the_order_given(tmp_path):
    images = contents(4)
    files = [write_tar(tmp_path / f"{number}.tar", samples(images[2 * number :][:2])) for number in (0, 1)]
    arguments = DataArguments(dataset="webdataset", data_files=files[::-1], streaming=True)
    source = open_stream(arguments, "train")
    assert [row for shard in source.shards for row in shard.read(0, 2)] == images[2:] + images[:2]


def test_splits_are_those_named_in_their_order():
    assert split_parts("b+a", ["a", "b", "c"], "x") == ["b", "a"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dataset": "tests"}, "tests"),
        ({"dataset": "someone/photos"}, "someone/photos"),
        ({"dataset": "digits"}, "digits"),
        ({"dataset": "parquet", "data_files": "https://x.org/a/b.parquet?key=secret"}, "parquet:b.parquet"),
        ({"dataset": "webdataset", "data_files": ["a/*.tar", "b/*.tar"]}, "webdataset:*.tar"),
    ],
)
def test_the_name_of_a_source_says_what_it_is_and_no_secret(options, name):
    assert source_name(DataArguments(**options)) == name
