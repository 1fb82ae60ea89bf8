"""A local HTTP server of a folder: it answers range requests, spoils a chosen share of them, and keeps a log."""

import hashlib
import re
import socket
import ssl
import struct
import sys
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import unquote, urlsplit

STATUSES = ("408", "429", "500", "502", "503", "504")
BROKEN_ANSWERS = ("reset before", "reset during", "short body", "wrong length", "truncated range", "wrong range")
STALLS = ("stall before", "stall during")
TRANSIENT = (*STATUSES, *BROKEN_ANSWERS, *STALLS)
PERMANENT = ("401", "403", "404")


@dataclass(frozen=True)
class Faults:
    """Which requests a server spoils, and how.

    Attributes:
        kinds: What may happen: a status, or one of the names above. "no range" and "no suffix" are servers that ignore
            ranges, or those that count from the end; "suffix refused" is one that answers these with 416; "trickle"
            sends a byte now and then.
        share: Share of requests, from 0 to 1.
        seed: Chooses the requests: by path, range, and how often the two came before; not by time or thread.
        first_times: Spoil no more than the first so many requests for a path; None sets no bound.
        headers: Sent along with a status; `{date+3}` stands for the HTTP date in three seconds.
        stall: Seconds for which a stalled answer says nothing more.
    """

    kinds: tuple[str, ...] = ()
    share: float = 1.0
    seed: int = 0
    first_times: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    stall: float = 30.0

    def of(self, path: str, wanted: str | None, times_before: int) -> str | None:
        """The fault of a request, if it gets one."""
        if not self.kinds:
            return None
        digest = hashlib.sha256(f"{self.seed} {path} {wanted} {times_before}".encode()).digest()
        draw, choice = struct.unpack("<QQ", digest[:16])
        return self.kinds[choice % len(self.kinds)] if draw < self.share * 2**64 else None


@dataclass
class Request:
    """One line of the log; times are of `time.monotonic`."""

    path: str
    wanted: str | None
    fault: str | None
    headers: dict[str, str]
    port: int  # of the client: tells connections apart
    began: float
    sent: int = 0
    ended: float = field(default=0.0)


class FaultServer:
    """Serves the files of a folder from a thread; to be used in a `with`.

    Args:
        folder: What to serve.
        faults: What to spoil; can be replaced while it runs.
        redirect_to: Answer with a redirect to this address instead of a file.
        certificate: Files of a certificate and its key; with them, the server speaks TLS.
    """

    def __init__(
        self,
        folder: Path,
        faults: Faults | None = None,
        redirect_to: str | None = None,
        certificate: tuple[Path, Path] | None = None,
    ):
        self.folder = folder
        self.faults = faults or Faults()
        self.redirect_to = redirect_to
        self.log: list[Request] = []
        self.errors: list[BaseException | None] = []
        self.stopping = Event()
        self._lock = Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._scheme = "http"
        if certificate is not None:
            self._scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def address(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"

    def requests(self, path: str) -> list[Request]:
        """Log of one file."""
        return [request for request in self.log if request.path == path]

    def enter(self, path: str, headers: dict[str, str], port: int) -> Request:
        """Write a request into the log, with its fault."""
        wanted = headers.get("range")
        with self._lock:
            before = self.requests(path)
            is_over = self.faults.first_times is not None and len(before) >= self.faults.first_times
            times_before = sum(request.wanted == wanted for request in before)
            fault = None if is_over else self.faults.of(path, wanted, times_before)
            self.log.append(Request(path, wanted, fault, headers, port, time.monotonic()))
            return self.log[-1]

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert self.errors == []


class _Server(ThreadingHTTPServer):
    owner: FaultServer
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no news; anything else is a fault of the tests."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.owner.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together

    def do_GET(self) -> None:
        owner = self.server.owner
        path = unquote(urlsplit(self.path).path).lstrip("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = owner.enter(path, headers, self.client_address[1])
        try:
            self.serve(request, owner.folder / path)
        finally:
            request.ended = time.monotonic()

    def serve(self, request: Request, file: Path) -> None:
        fault = request.fault
        if fault == "reset before":
            return self.reset()
        if fault == "stall before":
            return self.stall()
        if fault is not None and fault.isdecimal():
            return self.answer(int(fault), {name: with_date(value) for name, value in self.server.owner.faults.headers})
        if self.server.owner.redirect_to is not None:
            return self.answer(302, {"Location": f"{self.server.owner.redirect_to}{self.path}"})
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        return self.send(request, file)

    def send(self, request: Request, file: Path) -> None:
        """Answer with the wanted range of a file, spoiled or not."""
        size, fault = file.stat().st_size, request.fault
        found = span(request.wanted, size, fault)
        start, stop = found or (0, size)
        refused = fault == "suffix refused" and (request.wanted or "").startswith("bytes=-")
        if found and (start >= stop or refused):
            return self.answer(416, {"Content-Range": "bytes */*" if refused else f"bytes */{size}"})
        if fault == "truncated range":
            stop -= (stop - start) // 2
        if fault == "wrong range":
            start, stop = (start - 1, stop - 1) if start > 0 else (1, stop)
        with file.open("rb") as opened:
            opened.seek(start)
            body = opened.read(stop - start)
        length = len(body) // 2 if fault == "wrong length" else len(body)
        if fault in ("short body", "reset during", "stall during"):
            body = body[: len(body) // 2]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(length))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if fault == "trickle":
            return self.trickle(body)
        request.sent = len(body)  # before the client can look
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall during":
            self.stall()
        if fault == "reset during":
            self.reset()
        if fault in ("short body", "wrong length"):
            self.close_connection = True
        return None

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def trickle(self, body: bytes) -> None:
        """Send a byte every 50 ms, until the client has had enough."""
        for position in range(len(body)):
            self.wfile.write(body[position : position + 1])
            self.wfile.flush()
            if self.server.owner.stopping.wait(0.05):
                break

    def stall(self) -> None:
        """Say nothing for a while, and then hang up."""
        self.server.owner.stopping.wait(self.server.owner.faults.stall)
        self.close_connection = True

    def reset(self) -> None:
        """Break the connection as a machine does that goes away."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """The log is `FaultServer.log`."""


def span(wanted: str | None, size: int, fault: str | None) -> tuple[int, int] | None:
    """Start and stop of what a Range header asks for; None if it is ignored."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or fault == "no range" or (fault == "no suffix" and not match[1]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


def with_date(value: str) -> str:
    match = re.fullmatch(r"\{date\+(\d+)\}", value)
    return formatdate(time.time() + int(match[1]), usegmt=True) if match else value
