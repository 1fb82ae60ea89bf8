"""Files of many images as shards: rows that can be read from any place on, and are counted beforehand."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from e2mc_hf.data.file_shards import split_files
from e2mc_hf.data.parquet_shards import open_parquet
from e2mc_hf.data.tar_cache import open_tar

# Opening a remote file is waiting.
_OPEN_AT_ONCE = 16


@runtime_checkable
class Shard(Protocol):
    """Consecutive images of a dataset; no file is open but while it is read, so it travels to other processes."""

    @property
    def rows(self) -> int:
        """Number of images, which may be 0."""

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """Yield the image files of the rows `start` to `stop` (excluded), undecoded; None for a missing one."""


def open_shards(
    files: Sequence[str], format: Literal["parquet", "webdataset", "imagefolder"], image_column: str
) -> list[Shard]:
    """Count and find the images of files, which are not read further: footers of parquet, headers of tar files.

    The rows of all shards, one after another, are those of `load_dataset` on the same files, in the same order.

    Args:
        files: Local paths or URLs, in the order of the dataset.
        format: How images are packed in them; an image folder is a list of image files.
        image_column: Column of the images: a parquet column, or what follows the first dot of a tar member's name.

    Returns:
        One shard a file; of an image folder, one for a few files.

    Raises:
        UsageError: If a file is broken, or of a kind that can only be read map-style.
    """
    if format == "imagefolder":
        return [*split_files(files)]
    open_one: Callable[[str], Shard] = partial(
        open_parquet if format == "parquet" else open_tar, image_column=image_column
    )
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        return list(pool.map(open_one, files))
