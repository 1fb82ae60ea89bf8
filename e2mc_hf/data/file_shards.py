"""Image files that lie in folders, each of them a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from e2mc_hf.data.file_ranges import without_secrets
from e2mc_hf.data.remote_files import read_if_there
from e2mc_hf.errors import UsageError

# Shards are shuffled as wholes, then rows within a window: of a folder a class, long shards would leave classes apart.
_FILES_A_SHARD = 8


@dataclass(frozen=True)
class FileShard:
    """A few image files.

    Attributes:
        files: Paths or URLs.
    """

    files: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of files."""
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """Yield the content of the files `start` to `stop` (excluded); None for one that is no longer there."""
        for name in self.files[start:stop]:
            yield read_if_there(name)


def split_files(files: Sequence[str]) -> list[FileShard]:
    """Put the images among files into shards, in the order given.

    Raises:
        UsageError: If there are archives, or tables that say which files are the rows.
    """
    images = []
    for name in files:
        path = PurePosixPath(name)
        if any(suffix.lower() in ImageFolder.EXTENSIONS for suffix in path.suffixes[-2:]):
            images.append(name)
        elif path.suffix.lower() == ".zip" or path.name in ImageFolder.METADATA_FILENAMES:
            raise UsageError(
                f"`streaming` of an image folder needs nothing but image files, got {without_secrets(name)!r}."
                " Leave out --streaming."
            )
    return [FileShard(tuple(images[first : first + _FILES_A_SHARD])) for first in range(0, len(images), _FILES_A_SHARD)]
