"""Files to read from anywhere, whatever the network does."""

from pathlib import Path
from typing import BinaryIO


def open_file(url: str) -> BinaryIO:
    """Open a file to read at any position."""
    return Path(url).open("rb")
