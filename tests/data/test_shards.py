import pytest
from data.shard_files import contents, samples, write_parquet, write_tar

from e2mc_hf.data.shards import Shard, open_shards
from e2mc_hf.errors import UsageError


def read_all(shards):
    return [image for shard in shards for image in shard.read(0, shard.rows)]


def write_folder(folder, images):
    for number, image in enumerate(images):
        (folder / f"{number:03}.png").write_bytes(image)
    return [str(folder / f"{number:03}.png") for number in range(len(images))]


def test_every_format_gives_the_same_rows_in_the_order_of_the_files(tmp_path):
    images = contents(40)
    parts = [images[:1], [], images[1:33], images[33:]]
    parquet = [write_parquet(tmp_path / f"{n}.parquet", part) for n, part in enumerate(parts)]
    tars = [write_tar(tmp_path / f"{n}.tar", samples(part)) for n, part in enumerate(parts)]
    shards = {
        "parquet": open_shards(parquet, "parquet", "image"),
        "webdataset": open_shards(tars, "webdataset", "jpg"),
        "imagefolder": open_shards(write_folder(tmp_path, images), "imagefolder", "image"),
    }
    for format, opened in shards.items():
        assert read_all(opened) == images, format
        assert all(isinstance(shard, Shard) for shard in opened), format
    assert (
        [shard.rows for shard in shards["parquet"]] == [shard.rows for shard in shards["webdataset"]] == [1, 0, 32, 7]
    )


def test_a_broken_file_among_many_is_named(tmp_path):
    files = [write_parquet(tmp_path / f"{number}.parquet", contents(2)) for number in range(40)]
    (tmp_path / "23.parquet").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"whole parquet files, got .*23\.parquet"):
        open_shards(files, "parquet", "image")
