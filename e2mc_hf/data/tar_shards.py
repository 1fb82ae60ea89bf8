"""Tar files in the layout of webdataset: members of one name but for what follows its first dot are one sample."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from e2mc_hf.data.file_ranges import without_secrets
from e2mc_hf.data.remote_files import open_file
from e2mc_hf.errors import UsageError

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_MISSING = -1


@dataclass(frozen=True, eq=False)
class TarShard:
    """One tar file and where in it the images are.

    Attributes:
        file: Path or URL.
        size: Bytes of the file: with it, a remote one is opened without a request.
        offsets: First byte of each row's image, -1 where a sample has none.
        sizes: Bytes of each row's image.
    """

    file: str
    size: int
    offsets: Int64[np.ndarray, " rows"]
    sizes: Int64[np.ndarray, " rows"]

    @property
    def rows(self) -> int:
        """Number of samples."""
        return len(self.offsets)

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """Yield the image files of the rows `start` to `stop` (excluded); no other byte is asked for."""
        if start >= stop:
            return
        with open_file(self.file, size=self.size) as file:
            for offset, size in zip(self.offsets[start:stop].tolist(), self.sizes[start:stop].tolist(), strict=True):
                if offset == _MISSING:
                    yield None
                    continue
                file.seek(offset)
                yield file.read(size)


def index_tar(file: str, image_column: str) -> TarShard:
    """Read the headers of a tar file: samples and their order are those of `datasets`.

    Raises:
        UsageError: If the file is compressed, broken, or not in the layout of webdataset.
    """
    with open_file(file) as opened:
        _refuse_compressed(file, opened)
        try:
            places = [sample.get(image_column, (_MISSING, 0)) for sample in _samples(file, opened)]
        except tarfile.TarError as error:
            raise _broken(file, str(error)) from error
        size = opened.seek(0, os.SEEK_END)
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return TarShard(file, size, table[:, 0].copy(), table[:, 1].copy())


def first_fields(file: str) -> list[str]:
    """Read what the members of the first sample are called after the first dot, in their order.

    Raises:
        UsageError: If the file is compressed, broken, or not in the layout of webdataset.
    """
    with open_file(file) as opened:
        _refuse_compressed(file, opened)
        try:
            return list(next(_samples(file, opened), {}))
        except tarfile.TarError as error:
            raise _broken(file, str(error)) from error


def _samples(file: str, opened: BinaryIO) -> Iterator[dict[str, tuple[int, int]]]:
    """Yield each sample as what follows the dot to (offset, bytes) of the member; as `datasets` groups them.

    A sample ends where the next member of another name begins; members without a dot are none of any.
    """
    name: str | None = None
    sample: dict[str, tuple[int, int]] = {}
    for member in _members(file, opened):
        match = _NAME.fullmatch(member.name)
        if match is None:
            continue
        if match[1] != name and sample:
            yield sample
            sample = {}
        name = match[1]
        if match[2] in sample:
            raise _broken(file, f"{member.name!r} is there twice")
        sample[match[2]] = (member.offset_data, member.size)
    if sample:
        yield sample


def _members(file: str, opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of all files that are not hidden."""
    with tarfile.open(fileobj=opened, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # of a long archive they would fill the memory
            if member.size < 0:  # tarfile would go back to what it has read, again and again
                raise _broken(file, f"{member.name!r} has {member.size} bytes")
            if member.issparse():
                raise _broken(file, f"{member.name!r} is a sparse file")
            if member.isreg() and not member.name.rpartition("/")[2].startswith((".", "__")):
                yield member
        # tarfile takes a damaged header for the end, and the rest of the images would be missing without a word.
        opened.seek(archive.offset)
        if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise _broken(file, f"damaged header at byte {archive.offset}")


def _refuse_compressed(file: str, opened: BinaryIO) -> None:
    start = opened.read(6)
    opened.seek(0)
    found = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)
    if found is not None:
        raise UsageError(
            f"`streaming` needs tar files that are not compressed, got {found} in"
            f" {without_secrets(file)!r}."
            " Leave out --streaming, or unpack the tar file."
        )


def _broken(file: str, cause: str) -> UsageError:
    return UsageError(
        f"`dataset` must be made of whole tar files in the layout of webdataset, got"
        f" {without_secrets(file)!r} ({cause})."
        " Repair it, or fetch it again."
    )
