import pickle
from pathlib import Path

import datasets
import pytest
from data.shard_files import contents

from e2mc_hf.data.file_shards import FileShard, split_files
from e2mc_hf.errors import UsageError


@pytest.fixture
def files(tmp_path):
    """Twenty files of images in two folders, with something else between them."""
    images = contents(20)
    paths = []
    for number, image in enumerate(images):
        path = tmp_path / f"class{number // 10}" / f"{number:02}.{('png', 'JPEG', 'webp')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        paths.append(str(path))
    other = tmp_path / "class0" / "notes.txt"
    other.write_text("no image")
    return [*paths[:5], str(other), *paths[5:]]


def read_all(files):
    return [image for shard in split_files(files) for image in shard.read(0, shard.rows)]


def test_rows_are_those_of_datasets(files):
    rows = datasets.load_dataset("imagefolder", data_files=files, split="train", streaming=True)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    streamed = [row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in rows]
    assert read_all(files) == streamed == contents(20)


def test_a_file_counts_by_its_last_two_suffixes_as_it_does_for_datasets(tmp_path):
    names = ["a.png", "b.png.gz", "c.PNG", "d.tar.png", "e.png.old.txt", "f"]
    for name in names:
        (tmp_path / name).write_bytes(b"image")
    files = [str(tmp_path / name) for name in names]
    rows = datasets.load_dataset("imagefolder", data_files=files, split="train", streaming=True)
    streamed = [row["image"]["path"] for row in rows.cast_column("image", datasets.Image(decode=False))]
    assert [name for shard in split_files(files) for name in shard.files] == streamed == files[:4]


def test_shards_are_short_so_that_classes_mix(files):
    assert [shard.rows for shard in split_files(files)] == [8, 8, 4]


def test_any_range_of_rows_can_be_read(files):
    shard = split_files(files)[1]
    assert list(shard.read(2, 5)) == contents(20)[10:13]
    assert list(shard.read(5, 5)) == []


def test_a_file_is_opened_when_its_row_is_due(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    rows = FileShard((str(tmp_path / "a.png"), str(tmp_path / "b.png"))).read(0, 2)
    assert next(rows) == b"a"
    (tmp_path / "b.png").write_bytes(b"late")
    assert next(rows) == b"late"


def test_a_file_that_is_gone_is_a_missing_image(tmp_path):
    assert list(FileShard((str(tmp_path / "gone.png"),)).read(0, 1)) == [None]


def test_what_is_no_file_is_a_missing_image(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert list(FileShard((str(tmp_path / "a.png"), str(tmp_path / "loop.png"))).read(0, 2)) == [None, None]


def test_a_shard_travels(files):
    shard = split_files(files)[0]
    assert pickle.loads(pickle.dumps(shard)) == shard


@pytest.mark.parametrize("name", ["images.zip", "metadata.csv", "metadata.jsonl"])
def test_what_makes_other_rows_of_files_is_refused(name):
    with pytest.raises(UsageError, match=rf"nothing but image files, got '/there/{name}'\. Leave out --streaming"):
        split_files(["/there/a.png", f"/there/{name}"])
