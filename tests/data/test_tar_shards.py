import io
import pickle
import tarfile

import datasets
import pytest
from data.shard_files import contents, count_reads, num_bytes, samples, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data import tar_shards
from e2mc_hf.data.tar_shards import index_tar
from e2mc_hf.errors import UsageError


def rows_of_datasets(file, column="jpg"):
    """The rows as `load_dataset` streams them."""
    rows = datasets.load_dataset("webdataset", data_files=file, split="train", streaming=True)
    rows = rows.cast_column(column, datasets.Image(decode=False))
    return [row[column] and row[column]["bytes"] for row in rows]


def read_all(file, column="jpg"):
    shard = index_tar(file, column)
    return list(shard.read(0, shard.rows))


@pytest.fixture(scope="module")
def file_of_thirty(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("thirty") / "train.tar", samples(contents(30)))


def test_rows_are_those_of_datasets(file_of_thirty):
    assert read_all(file_of_thirty) == rows_of_datasets(file_of_thirty) == contents(30)


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=100)
def test_any_range_of_rows_can_be_read(file_of_thirty, start, stop):
    assert list(index_tar(file_of_thirty, "jpg").read(start, stop)) == contents(30)[start:stop]


LONG = "folder/" * 30


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_odd_archives_give_the_rows_of_datasets(tmp_path, format):
    members = samples(contents(5))  # the first five samples tell datasets the columns
    members += [
        ("README", b"no dot: of no sample"),
        (".hidden.jpg", b"hidden"),
        ("folder/.hidden.jpg", b"hidden"),
        ("folder/__private.jpg", b"hidden"),
        ("noimage.cls", b"7"),
        ("a.jpg", b"a"),
        ("README2", b"between two members of one sample"),
        ("a.cls", b"1"),
        ("folder.with.dots/b.jpg", b"b"),
        ("folder.with.dots/b.cls", b"1"),
        ("folder/a.jpg", b"not the a above"),
        ("a.jpg", b"a again is a sample of its own"),
        ("c.left.jpg", b"the field is left.jpg"),
        ("c.jpg", b"c"),
        ("d.JPG", b"another column"),
        ("e.cls", b"1"),
        ("e.jpg", b"e"),
        ("f.jpg", b""),
        ("last.cls", b"1"),
    ]
    if format != tarfile.USTAR_FORMAT:
        members += [(f"{LONG}g.jpg", b"g"), (f"{LONG}g.cls", b"1"), ("ü.jpg", b"umlaut")]
    file = write_tar(tmp_path / "x.tar", members, format=format)
    with tarfile.open(file, "a", format=format) as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder.jpg"), (tarfile.SYMTYPE, "link.jpg")):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.jpg"
            archive.addfile(header)
        header = tarfile.TarInfo("z.jpg")
        header.size = 1
        archive.addfile(header, io.BytesIO(b"z"))
    rows = read_all(file)
    assert rows == rows_of_datasets(file)
    assert rows.count(None) >= 2
    assert b"c" in rows
    assert b"z" in rows


def test_real_photographs_are_those_of_datasets(photo_folder, tmp_path):
    (file,) = photo_folder.glob("validation*")
    photographs = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    photographs = photographs.cast_column("image", datasets.Image(decode=False)).take(300)
    images = [row["image"]["bytes"] for row in photographs]
    packed = write_tar(tmp_path / "x.tar", samples(images))
    assert read_all(packed) == rows_of_datasets(packed) == images


def test_only_bytes_of_images_are_read_after_the_headers(tmp_path, monkeypatch):
    images = contents(20, size=1000)
    file = write_tar(tmp_path / "x.tar", [(f"{n}.{kind}", images[n]) for n in range(20) for kind in ("png", "jpg")])
    ranges = count_reads(monkeypatch, tar_shards)
    shard = index_tar(file, "jpg")
    assert num_bytes(ranges) < 43 * 513  # a header each, one byte to see that a member is whole
    ranges.clear()
    assert list(shard.read(5, 8)) == images[5:8]
    assert num_bytes(ranges) == sum(len(image) for image in images[5:8])


def test_an_archive_without_members_is_an_empty_shard(tmp_path):
    shard = index_tar(write_tar(tmp_path / "x.tar", []), "jpg")
    assert (shard.rows, list(shard.read(0, 0))) == (0, [])


def test_a_shard_travels_without_an_open_file(file_of_thirty):
    shard = index_tar(file_of_thirty, "jpg")
    rows = shard.read(0, 30)
    next(rows)
    assert list(pickle.loads(pickle.dumps(shard)).read(0, 30)) == contents(30)
    rows.close()


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_archive_is_refused(tmp_path, mode, kind):
    file = write_tar(tmp_path / "x.tar", samples(contents(3)), mode)
    with pytest.raises(UsageError, match=rf"not compressed, got {kind} in .*x\.tar'\. Leave out --streaming"):
        index_tar(file, "jpg")


def test_a_field_that_a_sample_has_twice_is_refused_as_datasets_does(tmp_path):
    file = write_tar(tmp_path / "x.tar", [*samples(contents(6)), ("00005.jpg", b"again")])
    with pytest.raises(UsageError, match=r"'00005\.jpg' is there twice"):
        index_tar(file, "jpg")
    with pytest.raises(ValueError, match="Duplicate field"):
        rows_of_datasets(file)


@pytest.mark.parametrize("length", [0, 100, 512, 700, 1100, 1536, 3000])
def test_an_archive_cut_off_is_never_read_as_a_shorter_one(tmp_path, length):
    images = contents(3, size=1000)
    file = tmp_path / "x.tar"
    write_tar(file, [(f"{n}.jpg", image) for n, image in enumerate(images)])
    file.write_bytes(file.read_bytes()[:length])
    if length == 1536:  # just after a whole member of 512 + 1024 bytes
        assert read_all(str(file)) == images[:1]
        return
    with pytest.raises(UsageError, match=r"`dataset` must be made of whole tar files .*x\.tar"):
        index_tar(str(file), "jpg")


def test_a_damaged_header_is_refused_instead_of_ending_the_archive(tmp_path):
    file = tmp_path / "x.tar"
    write_tar(file, samples(contents(5)))
    content = bytearray(file.read_bytes())
    content[4 * 512 + 148] ^= 1  # the checksum of the third header
    file.write_bytes(content)
    with pytest.raises(UsageError, match="damaged header at byte 2048"):
        index_tar(str(file), "jpg")


def test_a_sparse_file_is_refused_since_its_bytes_lie_apart(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    content = b"1\n0\n9\n".ljust(512, b"\0") + b"the bytes"
    member.size = len(content)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UsageError, match=r"'a\.jpg' is a sparse file"):
        index_tar(str(tmp_path / "x.tar"), "jpg")


def test_a_header_that_points_back_is_refused_instead_of_read_for_ever(tmp_path):
    file = tmp_path / "x.tar"
    write_tar(file, [("a.txt", b""), ("b.txt", b""), ("c.txt", b"")])
    content = bytearray(file.read_bytes())
    header = content[512:1024]
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)  # past its own 512 bytes, back to the header of a.txt
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[512:1024] = header
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"'b\.txt' has -1024 bytes"):
        index_tar(str(file), "jpg")


def test_signatures_stay_out_of_messages(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "open_file", lambda url: (tmp_path / "a.tar").open("rb"))
    for content, message in ((b"broken" * 200, "whole tar files"), (b"\x1f\x8b" * 600, "got gzip in")):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UsageError, match=rf"{message}.* 'https://x\.org/a\.tar'") as caught:
            index_tar("https://user:geheim@x.org/a.tar?signature=geheim", "jpg")
        assert "geheim" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    members = [(f"{n}.{kind}", pickle.dumps(Trap())) for n in range(3) for kind in ("pkl", "pickle", "pyd", "jpg")]
    assert len(read_all(write_tar(tmp_path / "x.tar", members))) == 3
    assert not (tmp_path / "sprung").exists()
