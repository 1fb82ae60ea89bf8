"""Files of images in every packing, and what was read of them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def contents(count: int, size: int = 50) -> list[bytes]:
    """File contents like no other; no images, since nothing is decoded here."""
    return [bytes([number % 251, number // 251]) + number.to_bytes(4, "big") * (size // 4) for number in range(count)]


def write_parquet(path: Path, images: Sequence[bytes | None], row_group_size: int = 4, **options) -> str:
    column = pa.array([{"bytes": image, "path": "x.jpg"} for image in images], type=IMAGE_TYPE)
    table = pa.table({"label": pa.array(range(len(images)), pa.int64()), "image": column})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return str(path)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w", **options) -> str:
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


def samples(images: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Members of a tar in the layout of webdataset: an image and its class each."""
    return [
        member
        for number, image in enumerate(images)
        for member in ((f"{number:05}.cls", str(number).encode()), (f"{number:05}.jpg", image))
    ]


class CountingFile(io.FileIO):
    """A file that keeps the range of bytes of each read."""

    ranges: list[tuple[int, int]]

    def read(self, size: int = -1, /) -> bytes:
        start = self.tell()
        content = super().read(size) or b""
        self.ranges.append((start, start + len(content)))
        return content


def count_reads(monkeypatch, module) -> list[tuple[int, int]]:
    """Have a module open counting files; returns the ranges they will have read."""
    ranges: list[tuple[int, int]] = []

    def open_counting(name: str, **_) -> CountingFile:
        file = CountingFile(name)
        file.ranges = ranges
        return file

    monkeypatch.setattr(module, "open_file", open_counting)
    return ranges


def num_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)
