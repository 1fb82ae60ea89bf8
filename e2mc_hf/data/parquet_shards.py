"""Parquet files, read a row group at a time and no other column than the images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from e2mc_hf.data.file_ranges import without_secrets
from e2mc_hf.data.remote_files import open_file, read_if_there
from e2mc_hf.errors import UsageError

# Rows decoded at once: of a row group the file's own, compressed bytes are held, not all of its images beside them.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetShard:
    """One parquet file.

    Attributes:
        file: Path or URL.
        image_column: Column of the images: structs of `bytes` and `path`, or plain binary.
        row_groups: Rows of each row group.
    """

    file: str
    image_column: str
    row_groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of images."""
        return sum(self.row_groups)

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """Yield the image files of the rows `start` to `stop` (excluded); their row groups alone are read.

        Raises:
            UsageError: If the file is broken.
        """
        if start >= stop:
            return
        with _opened(self.file) as opened:
            end = 0
            for group, rows in enumerate(self.row_groups):
                position, end = end, end + rows
                if end <= start or stop <= position:
                    continue
                for batch in opened.iter_batches(_ROWS_AT_ONCE, [group], [self.image_column], use_threads=False):
                    column = batch.column(self.image_column)
                    for value in column[max(0, start - position) : max(0, stop - position)].to_pylist():
                        yield self._encoded(value)
                    position += len(column)

    def _encoded(self, value: dict[str, Any] | bytes | None) -> bytes | None:
        """Take the bytes out of a value of the column, or read the file it names."""
        if not isinstance(value, dict):
            return value
        encoded: bytes | None = value["bytes"]
        path = value.get("path")
        if encoded is not None or not path:
            return encoded
        return read_if_there(_beside(self.file, path))


def open_parquet(file: str, image_column: str) -> ParquetShard:
    """Read the footer of a parquet file.

    Raises:
        UsageError: If the file is broken, or has no such column of image files.
    """
    with _opened(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        kind = schema.field(image_column).type if image_column in schema.names else None
        if kind is None or not (_is_binary(kind) or _has_bytes(kind)):
            raise UsageError(
                f"`image_column` must hold image files (binary, or a struct of bytes and path), got {image_column!r}"
                f" of type {kind} in {without_secrets(file)!r}. Choose from its columns: {', '.join(schema.names)}."
            )
        groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return ParquetShard(file, image_column, tuple(groups))


@contextmanager
def _opened(file: str) -> Iterator[parquet.ParquetFile]:
    """Open a parquet file; a broken one is the user's error, one that cannot be reached is not touched."""
    with open_file(file) as source:
        try:
            # Buffering ahead, Arrow would read all row groups at once, in threads of its own.
            with parquet.ParquetFile(source, pre_buffer=False) as opened:
                yield opened
        except (pa.ArrowException, OSError) as error:
            # Arrow has no error of its own for a page it cannot unpack; what a file raises is more than an OSError.
            if isinstance(error, OSError) and type(error) is not OSError:
                raise
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UsageError(
                f"`dataset` must be made of whole parquet files, got {without_secrets(file)!r} ({cause})."
                " Repair it, or fetch it again."
            ) from error


def _is_binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _beside(file: str, path: str) -> str:
    """Find a file named in a table: relative to the table's folder unless it says where it is."""
    if "://" in path:
        return path
    if "://" in file:
        return f"{file.rpartition('/')[0]}/{path}"
    return str(Path(file).parent / path)
