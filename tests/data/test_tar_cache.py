import datasets
import pytest
from data.shard_files import contents, count_reads, samples, write_tar

from e2mc_hf.data import tar_shards
from e2mc_hf.data.tar_cache import open_tar

COMMIT = "0123456789" * 4


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(folder, num_images=10):
    folder.mkdir(exist_ok=True)
    return write_tar(folder / "x.tar", [*samples(contents(num_images)), ("last.cls", b"a sample without image")])


def test_a_file_of_a_commit_is_read_through_once(tmp_path, cache, monkeypatch):
    file = write(tmp_path / f"name@{COMMIT}")
    first = open_tar(file, "jpg")
    reads = count_reads(monkeypatch, tar_shards)
    second = open_tar(file, "jpg")
    assert reads == []
    assert list(second.read(0, second.rows)) == list(first.read(0, first.rows)) == [*contents(10), None]
    assert second.size == first.size


def test_the_column_is_part_of_what_is_kept(tmp_path, cache):
    file = write(tmp_path / f"name@{COMMIT}")
    assert list(open_tar(file, "jpg").read(3, 4)) == contents(10)[3:4]
    assert list(open_tar(file, "cls").read(3, 4)) == [b"3"]


def test_an_empty_file_is_kept_too(tmp_path, cache):
    (tmp_path / f"name@{COMMIT}").mkdir()
    file = write_tar(tmp_path / f"name@{COMMIT}" / "x.tar", [])
    assert [open_tar(file, "jpg").rows for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("folder", ["name", "name@main"])
def test_a_file_that_may_change_is_looked_at_again(tmp_path, cache, folder):
    assert open_tar(write(tmp_path / folder, 10), "jpg").rows == 11
    assert open_tar(write(tmp_path / folder, 20), "jpg").rows == 21
    assert not cache.exists()
