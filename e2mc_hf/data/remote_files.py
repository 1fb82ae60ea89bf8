"""Files to read from anywhere, whatever the network does: an image shard on the Hub reads like one on a disk."""

import io
import os
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from e2mc_hf.data.file_ranges import FileRanges, FilesystemRanges, Opening, without_secrets
from e2mc_hf.data.http_ranges import HttpRanges
from e2mc_hf.data.retrying import Patience, RemoteFileError, RetryPolicy, TransientError

MIN_REQUEST = 64 * 1024  # bytes
MAX_READ_AHEAD = 8 * 1024 * 1024  # bytes
DEFAULT_POLICY = RetryPolicy()
# Answers of a server that has no such file.
_GONE = (404, 410)


def open_file(url: str, *, size: int | None = None, policy: RetryPolicy | None = None) -> BinaryIO:
    """Open a file to read at any position.

    A remote file is opened with one request, which brings its size and its last bytes (of `.parquet`: the footer) or
    its first. Each read then repeats, in requests of its own, whatever part a fault of the network took. Open it in the
    process that reads it: the URL can be sent to another process, the open file cannot.

    Args:
        url: A path, or a URL: http(s)://, hf://datasets/<user>/<name>@<revision>/<path>, or any other that fsspec
            knows.
        size: Bytes of the file, if they are known: opening it then makes no request, and finds no error either.
        policy: How long to put up with faults; `DEFAULT_POLICY` when not given.

    Returns:
        A seekable binary file.

    Raises:
        FileNotFoundError: If there is no such file on this disk.
        RemoteFileError: If the server refuses the file (401, 403, 404 ...): at once, now or at a later read.
        RemoteFileUnreachableError: If the patience of the policy is spent, now or at a later read.
    """
    if "://" not in url:
        return Path(url).open("rb")
    policy = policy or DEFAULT_POLICY
    is_http = url.startswith(("http://", "https://", "hf://"))
    ranges: FileRanges = HttpRanges(url, policy) if is_http else FilesystemRanges(url)
    file = RemoteFile(ranges, policy)
    file.open(size, at_end=without_secrets(url).endswith(".parquet"))
    return cast(BinaryIO, file)


def read_if_there(url: str) -> bytes | None:
    """Read a whole file; None if there is none of that name, or none on this disk that may be read.

    Args:
        url: As for `open_file`. A folder is no file, nor is a device, of which a table could name one without an end.

    Raises:
        RemoteFileError: If a server refuses the file for any other reason than that it has none.
        RemoteFileUnreachableError: If the patience of the policy is spent.
    """
    if "://" not in url and not os.path.isfile(url):  # noqa: PTH113 - pathlib raises on names no file can have
        return None
    try:
        with open_file(url) as file:
            return file.read()
    except (FileNotFoundError, PermissionError):
        return None
    except RemoteFileError as error:
        if error.status in _GONE:
            return None
        raise


class RemoteFile(io.BufferedIOBase):
    """A file whose bytes come in ranges over a network that fails now and then.

    Large reads are one request each. Small reads that follow one another are served from a read-ahead that doubles from
    64 KiB to 8 MiB, so that a tar file needs few requests and the footer of a parquet file does not fetch the file.

    Args:
        ranges: The file on its server.
        policy: How long one read puts up with faults.
    """

    mode = "rb"

    def __init__(self, ranges: FileRanges, policy: RetryPolicy):
        self.name = ranges.shown_url
        self.size = 0
        self._ranges = ranges
        self._policy = policy
        self._position = 0
        self._first = Opening(0)  # kept, since footers and magic numbers are read again
        self._last = Opening(0)
        self._last_stop = 0  # where the last request ended
        self._read_ahead = MIN_REQUEST

    def open(self, size: int | None, at_end: bool) -> None:
        """Find out the size, unless it is known, and keep the bytes that come with it."""
        if size is not None:
            self.size = size
            return
        patience = Patience(self._policy, self.name)
        repeated = False
        while True:
            try:
                self._first = self._ranges.opening(at_end, repeated)
                self.size = self._first.size
                return
            except TransientError as error:
                patience.wait(error)
            repeated = True

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, or up to the end of the file."""
        if self.closed:
            raise ValueError(f"{self.name} is closed.")
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        parts = []
        while self._position < stop:
            part = self._kept(stop) or self._request(stop)
            self._position += len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read1(self, size: int = -1, /) -> bytes:
        """Read like `read`: fewer bytes would save nothing."""
        return self.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position of the next read; no request."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"The position in a file must be at least 0, got {origin + offset}.")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """Position of the next read."""
        return self._position

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Let the kept bytes go."""
        self._first = self._last = Opening(0)
        super().close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"The open file {self.name} cannot be pickled. Send its URL, and open it there.")

    def _kept(self, stop: int) -> bytes:
        """The bytes from the position on that are at hand, up to `stop`."""
        for block in (self._last, self._first):
            begin = self._position - block.start
            if 0 <= begin < len(block.content):
                return block.content[begin : stop - block.start]
        return b""

    def _request(self, stop: int) -> bytes:
        """Fetch the bytes from the position up to `stop`, and some more if the file is read in sequence."""
        start = self._position
        follows = 0 <= start - self._last_stop <= MIN_REQUEST
        self._read_ahead = min(2 * self._read_ahead, MAX_READ_AHEAD) if follows else MIN_REQUEST
        until = min(self.size, max(stop, start + self._read_ahead))
        content = self._fetch(start, until)
        self._last_stop = until
        if until == stop > start + MAX_READ_AHEAD:
            return content  # all of it asked for: not worth keeping
        self._last = Opening(self.size, start, content)
        return content[: stop - start]

    def _fetch(self, start: int, stop: int) -> bytes:
        patience = Patience(self._policy, self.name)
        chunks: list[bytes] = []
        while start < stop:
            try:
                for chunk in self._ranges.chunks(start, stop, self.size):
                    chunks.append(chunk)
                    start += len(chunk)
                    patience.progress()
                if start < stop:
                    raise TransientError(f"the answer ended {stop - start} bytes too early")
            except TransientError as error:
                if start < stop:
                    patience.wait(error)
        return b"".join(chunks)
