"""Open a checkpoint of unknown origin: nothing in it is executed, and it takes no more memory than it has bytes.

Three kinds are read: archives of `torch.save`, its format before torch 1.6, and safetensors. What a file claims is
checked before anything is allocated; then `torch.load(weights_only=True)` reads it with the list of `safe_pickle`.
There is no second, less careful try.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file

from e2mc_hf.errors import UsageError
from e2mc_hf.models.safe_pickle import DISCARDED, Claims, Discarded, UnsafeFileError, read_claims

MAX_FILE_BYTES = 32 << 30
MAX_INDEX_BYTES = 16 << 20  # the pickle, the directory of an archive, or the header of a safetensors file
MAX_ENTRIES = 100_000
# Tensors may share numbers, tied weights for example, but not without end: a copy of each has to fit.
MAX_SHARING = 4
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PROTOCOL = 1001
_LOOKS_LIKE = {
    b"version https://git-lfs": "a pointer of git LFS; fetch the file itself",
    b"<": "a web page; download the file itself",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x80": "a pickle that torch.save did not write",
}


@dataclass(frozen=True)
class FileRecord:
    """Where numbers came from, without a path on this machine.

    Attributes:
        name: Name of the file.
        size: Bytes.
        sha256: Of the whole file.
        container: `torch archive`, `torch legacy` or `safetensors`.
    """

    name: str
    size: int
    sha256: str
    container: str


def read_checkpoint(path: str | Path) -> tuple[Any, FileRecord]:
    """Read a `.pth`, `.pt` or `.safetensors` file that may be hostile.

    Args:
        path: The file; what is in it decides how it is read, not its name.

    Returns:
        What was saved, with tensors on the CPU, and a record of the file. Other objects than tensors, dictionaries,
        lists, texts and numbers are left out.

    Raises:
        UsageError: If it is no such file, damaged, claims more than it has, or refers to anything that could be
            executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"`file` must be a checkpoint on this machine, got {str(path)!r}: no such file. Check it.")
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            container, content = _read(file, path, size)
            return content, FileRecord(path.name, size, _sha256(file), container)
    except UnsafeFileError as error:
        raise UsageError(
            f"`file` must be a checkpoint of tensors and plain values, got {path.name!r}, which {error}. Nothing of it "
            "was executed. Download it anew; or, where you trust it, save its state dict alone as safetensors."
        ) from error
    except OSError as error:
        raise UsageError(f"`file` must be readable, got {path.name!r}: {error.strerror}. Check its rights.") from error


def _read(file: BufferedIOBase, path: Path, size: int) -> tuple[str, Any]:
    if size > MAX_FILE_BYTES:
        raise UnsafeFileError(f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    start = _at(file, 0, 32)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(file, size)
        return "torch archive", _load(file)
    if start.startswith(_LEGACY_START):
        _check_legacy(file, size)
        return "torch legacy", _load(file)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 0 < header <= size - 8:
        if header > MAX_INDEX_BYTES:
            raise UnsafeFileError(f"has a header of {header:,} bytes")
        with _reader_errors():
            return "safetensors", load_file(path)
    kind = next((kind for first, kind in _LOOKS_LIKE.items() if start.startswith(first)), "of no known kind")
    raise UnsafeFileError(f"is {kind}" if size else "is empty")


def _load(file: BufferedIOBase) -> Any:
    file.seek(0)
    with _reader_errors(), torch.serialization.safe_globals([(Discarded, path) for path in DISCARDED]):
        return torch.load(cast(IO[bytes], file), map_location="cpu", weights_only=True)


@contextmanager
def _reader_errors() -> Iterator[None]:
    """Turn whatever a damaged file makes a reader raise into one kind of error."""
    try:
        yield
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UnsafeFileError(f"is damaged: {type(error).__name__} {cause[:200]!a}") from error


def _check_claims(claims: Claims, size: int) -> None:
    stored = sum(storage.item_size * storage.numel for storage in claims.storages.values())
    for claimed, limit in ((stored, size), (claims.tensor_bytes, MAX_SHARING * size)):
        if claimed > limit:
            raise UnsafeFileError(f"claims {claimed:,} bytes of tensors where it has {size:,}")


def _check_legacy(file: BufferedIOBase, size: int) -> None:
    """Check five pickles in a row, then the storages: each its length in 8 bytes and its numbers."""
    file.seek(len(_LEGACY_START))
    if read_claims(file, size).value != _LEGACY_PROTOCOL:
        raise UnsafeFileError("is damaged: its version is not that of the format before torch 1.6")
    read_claims(file, size)  # of the machine that wrote it
    claims = read_claims(file, size, legacy=True)
    _check_claims(claims, size)
    keys = read_claims(file, size).value
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(claims.storages):
        raise UnsafeFileError("is damaged: it lists other storages than its tensors need")
    position = file.tell()
    for key in keys:
        storage = claims.storages[key]
        if int.from_bytes(_at(file, position, 8), "little") != storage.numel:
            raise UnsafeFileError("is damaged: a storage has another length than its tensors need")
        position += 8 + storage.numel * storage.item_size
    if position > size:
        raise UnsafeFileError(f"is cut off: it has {size:,} of at least {position:,} bytes")


def _check_archive(file: BufferedIOBase, size: int) -> None:
    """Check an archive of `torch.save`, which compresses nothing, and the pickle in it."""
    _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise UnsafeFileError("is damaged: its directory cannot be read") from error
    root = entries[0].filename.split("/")[0] + "/" if entries else ""
    places = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.filename
        is_new = name.startswith(root) and name.lower() not in places
        if not (is_new and name.isascii() and entry.orig_filename == name):
            raise UnsafeFileError("is damaged: its directory holds a name twice or in another folder")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UnsafeFileError("is compressed, which torch.save never does")
        local = _at(file, entry.header_offset, 30)
        begin = entry.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        is_stored = local[:4] == b"PK\x03\x04" and local[8:10] == b"\0\0"
        if not is_stored or entry.header_offset < end or begin + entry.file_size > size:
            raise UnsafeFileError("is damaged: its entries overlap or end outside")
        end = begin + entry.file_size
        if _crc32(file, begin, entry.file_size) != entry.CRC:  # which torch does not compare
            raise UnsafeFileError(f"is damaged: the checksum of its entry {name[:80]!r} is another")
        places[name.lower()] = (begin, entry.file_size)
    if f"{root}constants.pkl" in places:
        raise UnsafeFileError("is a program (TorchScript); save its state dict")
    _check_archive_claims(file, size, {name.removeprefix(root.lower()): place for name, place in places.items()})


def _check_archive_claims(file: BufferedIOBase, size: int, places: dict[str, tuple[int, int]]) -> None:
    if "data.pkl" not in places:
        raise UnsafeFileError("is an archive without the pickle that torch.save writes")
    begin, length = places["data.pkl"]
    if length > MAX_INDEX_BYTES:
        raise UnsafeFileError(f"has a pickle of {length:,} bytes")
    claims = read_claims(io.BytesIO(_at(file, begin, length)), size)
    for key, storage in claims.storages.items():
        _, stored = places.get(f"data/{key}", (0, -1))
        if not key.isalnum() or stored != storage.item_size * storage.numel:
            raise UnsafeFileError(
                f"claims {storage.item_size * storage.numel:,} bytes for storage {key[:20]!r} and holds "
                + (f"{stored:,}" if stored >= 0 else "none")
            )
    _check_claims(claims, size)


def _check_directory(file: BufferedIOBase, size: int) -> None:
    """Check that an archive has one directory, at its very end: readers disagree about which of two counts."""
    tail = _at(file, size - 22, 22)
    entries, length, begin = (int.from_bytes(tail[a:b], "little") for a, b in ((10, 12), (12, 16), (16, 20)))
    end = size - 22
    locator = _at(file, size - 42, 20)
    if locator.startswith(b"PK\x06\x07"):
        end = size - 98
        wide = _at(file, end, 56)
        if int.from_bytes(locator[8:16], "little") != end or not wide.startswith(b"PK\x06\x06"):
            raise UnsafeFileError("is damaged: its directory is not where it says")
        entries, length, begin = (int.from_bytes(wide[a:b], "little") for a, b in ((32, 40), (40, 48), (48, 56)))
    if not tail.startswith(b"PK\x05\x06") or tail[20:] != b"\0\0" or begin + length != end:
        raise UnsafeFileError("is cut off or damaged: its directory is not at its end")
    if entries > MAX_ENTRIES or length > MAX_INDEX_BYTES:
        raise UnsafeFileError(f"has {entries:,} entries")


def _at(file: BufferedIOBase, position: int, count: int) -> bytes:
    file.seek(max(position, 0))
    return file.read(count)


def _crc32(file: BufferedIOBase, position: int, count: int) -> int:
    checksum = 0
    file.seek(position)
    for start in range(0, count, 1 << 20):
        checksum = zlib.crc32(file.read(min(1 << 20, count - start)), checksum)
    return checksum


def _sha256(file: BufferedIOBase) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
