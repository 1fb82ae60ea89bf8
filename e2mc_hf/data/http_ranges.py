"""Parts of one file over HTTP: the bytes asked for, or an error that tells what kind of fault it was."""

import atexit
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from threading import Lock
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import constants, hf_hub_url, is_offline_mode, parse_hf_uri
from huggingface_hub.errors import HfUriError
from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]  # exported, by __getattr__

from e2mc_hf.data.file_ranges import Opening, without_secrets
from e2mc_hf.data.retrying import RemoteFileError, RetryPolicy, TransientError, asked_wait, passes_by_itself

OPENING_SIZE = 64 * 1024  # bytes; what pyarrow reads of a parquet file first, and enough for most footers

_clients: dict[int, httpx.Client] = {}  # by process: a fork leaves its parent's alone
_opening_client = Lock()


class _Answer(NamedTuple):
    response: httpx.Response
    start: int  # position of the first byte of the body
    size: int | None  # of the whole file


class HttpRanges:
    """One file on a server that answers range requests, or on the Hugging Face Hub.

    Proxies and certificates are taken from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE ...).

    Args:
        url: http://, https:// or hf:// URL. On the Hub, HF_TOKEN or the stored login is sent along.
        policy: Gives the timeout of requests.
    """

    def __init__(self, url: str, policy: RetryPolicy):
        self.shown_url = without_secrets(url)
        self._url = _hub_file_url(url) if url.startswith("hf://") else url
        self._is_on_hub = self._url.startswith(f"{constants.ENDPOINT}/")
        self._policy = policy
        try:
            urlsplit(self._url)
        except ValueError as error:  # the client would look for a server of that name
            raise self._error(f"is at no usable address ({error})", "Check the URL.") from error
        if self._is_on_hub and is_offline_mode():
            raise self._error("is on the Hub, and HF_HUB_OFFLINE is set", "Unset it, or copy the file to a disk first.")

    def opening(self, at_end: bool, repeated: bool) -> Opening:
        """Find out the size of the file, with its first or last bytes: a few servers cannot count from the end."""
        at_end = at_end and not repeated
        try:
            with self._answer(f"bytes=-{OPENING_SIZE}" if at_end else f"bytes=0-{OPENING_SIZE - 1}") as answer:
                if answer.size is None:
                    raise self._error("does not tell the size of the file", "Copy the file to a disk first.")
                if answer.response.status_code == HTTPStatus.OK:  # the server knows no ranges, or none from the end
                    return Opening(answer.size)
                content = b"".join(self._body(answer.response))
                return Opening(answer.size, answer.start, content[: answer.size - answer.start])
        except RemoteFileError as error:
            if at_end and error.status in (400, 416, 501):
                return self.opening(at_end=False, repeated=True)
            raise

    def chunks(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop` as they arrive; ends early where the server does."""
        with self._answer(f"bytes={start}-{stop - 1}") as answer:
            if answer.size not in (None, size):
                raise self._error(
                    f"now has {answer.size} bytes, {size} when it was opened",
                    "It changed while it was read: start again, with a fixed `revision` if it is on the Hub.",
                )
            if answer.response.status_code == HTTPStatus.OK and start > 0:
                raise self._error(
                    "comes whole where a part was asked for",
                    "Its server does not answer range requests: use one that does, or copy the file to a disk first.",
                )
            if answer.start != start:
                raise TransientError(f"got bytes from {answer.start} on instead of {start}")
            missing = stop - start
            for chunk in self._body(answer.response):
                part = chunk[:missing]
                missing -= len(part)
                if part:
                    yield part
                if len(part) < len(chunk):  # not as soon as nothing is missing: a connection read to its end is reused
                    return

    @contextmanager
    def _answer(self, wanted: str) -> Iterator[_Answer]:
        headers = {"Range": wanted, "Accept-Encoding": "identity"} | (build_hf_headers() if self._is_on_hub else {})
        try:
            timeout = self._policy.request_timeout
            with _client().stream("GET", self._url, headers=headers, timeout=timeout) as response:
                yield self._checked(response)
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise self._error(f"is at no usable address ({error})", "Check the URL.") from error
        except httpx.TransportError as error:
            if _has_cause(error, ssl.SSLCertVerificationError):
                raise self._error(
                    f"is on a server whose certificate is not trusted ({error})",
                    "Set SSL_CERT_FILE to the certificates of your network.",
                ) from error
            raise TransientError(f"{type(error).__name__} {error}".strip()) from error

    def _checked(self, response: httpx.Response) -> _Answer:
        status = response.status_code
        content_range = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        size = int(content_range[2]) if content_range and content_range[2] != "*" else None
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and size == 0:
            return _Answer(response, 0, 0)
        if passes_by_itself(status):
            raise TransientError(f"status {_named(status)}", asked_wait(response.headers))
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise self._refusal(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._error("comes compressed by its server", "Switch that off, or copy the file to a disk first.")
        if status == HTTPStatus.OK:
            length = response.headers.get("Content-Length", "")
            return _Answer(response, 0, int(length) if length.isdecimal() else None)
        if not content_range or content_range[1] is None:
            raise TransientError("status 206 without the range it holds")
        return _Answer(response, int(content_range[1]), size)

    def _body(self, response: httpx.Response) -> Iterator[bytes]:
        """Yield the body as it arrives; a trickle counts as a stall."""
        timeout = self._policy.request_timeout
        arrived, since = 0, time.monotonic()
        for chunk in response.iter_raw():
            yield chunk
            arrived += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed > timeout:
                if arrived < self._policy.slowest_rate * elapsed:
                    raise TransientError(f"only {arrived} bytes in {elapsed:.1f} s")
                arrived, since = 0, time.monotonic()

    def _refusal(self, response: httpx.Response) -> RemoteFileError:
        status = response.status_code
        said = response.headers.get("X-Error-Message")
        answer = f"was refused with status {_named(status)}" + (f" ({said})" if said else "")
        if status not in (401, 403):
            return self._error(answer, "Check the name and the revision.", status)
        if not self._is_on_hub:
            return self._error(answer, "Use a URL that you may read.", status)
        page = self._url.split("/resolve/")[0]
        return self._error(
            answer,
            f"Log in with HF_TOKEN or `hf auth login`, accept the conditions on {page} if it has some, and check the "
            "name: the Hub refuses what it does not have in the same way.",
            status,
        )

    def _error(self, what: str, remedy: str, status: int | None = None) -> RemoteFileError:
        return RemoteFileError(f"The file {self.shown_url} {what}. {remedy}", self.shown_url, status)


def _client() -> httpx.Client:
    """The client of this process, for all servers and threads.

    Not that of huggingface_hub: it is closed in every process forked from this one, which would wait forever for a lock
    that a thread of ours held at that moment.
    """
    process = os.getpid()
    if process not in _clients:
        with _opening_client:
            if process not in _clients:
                _clients[process] = httpx.Client(follow_redirects=True)
                atexit.register(_clients[process].close)
    return _clients[process]


def _hub_file_url(url: str) -> str:
    try:
        file = parse_hf_uri(url)
    except HfUriError as error:
        raise RemoteFileError(f"{error} Write hf://datasets/<user>/<name>@<revision>/<path>.", url) from error
    if file.is_bucket or not file.path_in_repo:
        raise RemoteFileError(f"{url} is no file of a repository. Give the path of a file in a dataset.", url)
    return hf_hub_url(file.id, file.path_in_repo, repo_type=file.type, revision=file.revision)


def _named(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
