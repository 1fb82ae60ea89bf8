"""Parts of a remote file: what a server must be able to do, and how any of fsspec's file systems does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]

from e2mc_hf.data.retrying import RemoteFileError, TransientError, passes_by_itself


class Opening(NamedTuple):
    """What the first request tells about a file.

    Attributes:
        size: Bytes of the whole file.
        start: Position of `content` in it.
        content: Its first or last bytes; none if the server gave none.
    """

    size: int
    start: int = 0
    content: bytes = b""


@runtime_checkable
class FileRanges(Protocol):
    """One remote file, from which every call makes one request, without repeating it.

    Attributes:
        shown_url: What messages call the file.
    """

    shown_url: str

    def opening(self, at_end: bool, repeated: bool) -> Opening:
        """Find out the size of the file.

        Args:
            at_end: Bring the last bytes along, rather than the first.
            repeated: Whether this failed before: then the first bytes will do.

        Raises:
            TransientError: If the request failed in a way that is worth repeating.
            RemoteFileError: If it is not.
        """

    def chunks(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop` as they arrive; ends early where the server does.

        Args:
            start: First position.
            stop: Position after the last.
            size: Bytes of the file as it was opened.

        Raises:
            TransientError: If the request failed in a way that is worth repeating.
            RemoteFileError: If it is not.
        """


class FilesystemRanges:
    """A file on one of fsspec's file systems (s3://, gs://, memory:// ...).

    Some of these repeat requests on their own; what they give up is repeated here.

    Args:
        url: URL of a file.
    """

    def __init__(self, url: str):
        self.shown_url = without_secrets(url)
        with self._errors():
            self._filesystem, self._path = fsspec.url_to_fs(url)

    def opening(self, at_end: bool, repeated: bool) -> Opening:
        """Find out the size of the file; its bytes are left to the reads."""
        with self._errors():
            size = self._filesystem.info(self._path)["size"]
        if size is None:
            raise RemoteFileError(f"The size of {self.shown_url} is unknown. Copy it to a disk first.", self.shown_url)
        return Opening(size)

    def chunks(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop`."""
        with self._errors():
            content = self._filesystem.cat_file(self._path, start=start, end=stop)
        yield content[: stop - start]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError) as error:
            raise self._error(f"({type(error).__name__}: {error})") from error
        except Exception as error:
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(status, int) and not passes_by_itself(status):
                raise self._error(f"(status {status}: {error})", status) from error
            if isinstance(status, int) or isinstance(error, OSError):
                raise TransientError(f"{type(error).__name__} {error}".strip()) from error
            raise

    def _error(self, what: str, status: int | None = None) -> RemoteFileError:
        message = f"The file {self.shown_url} cannot be read {what}. Check the URL and your rights to read it."
        return RemoteFileError(message, self.shown_url, status)


def without_secrets(url: str) -> str:
    """The URL without user, password and query, where signatures and tokens stand; a path, or one of the Hub, as is."""
    if "://" not in url or url.startswith("hf://"):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # an address no server can have
        return f"{url.partition('://')[0]}://..."
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
