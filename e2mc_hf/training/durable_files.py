"""Files that are on the disk, not only in the memory of the operating system, once a function returns."""

import errno
import os
from pathlib import Path

# What file systems answer that cannot sync a folder, such as those of object stores.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        OSError: If it cannot be written or synced.
    """
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has every file of a folder, and their names.

    Raises:
        OSError: If one cannot be synced.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Wait until the disk has the content of a file."""
    # Windows syncs only what is open for writing.
    _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; nothing where a folder cannot be synced."""
    if os.name == "nt":
        return
    try:
        _sync(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
