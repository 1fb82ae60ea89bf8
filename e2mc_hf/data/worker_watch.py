"""A clock that ends workers which send nothing, and stands still while they are not the ones to wait for."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Killable(Protocol):
    """A process."""

    def kill(self) -> None:
        """End it at once."""


class WorkerWatch:
    """Kill workers that keep the loader waiting.

    A loader can wait inside a connection to a frozen worker, which no timeout of its own ends; the end of that worker
    does. Time in which the loader itself reads the rows to come does not count: a slow network is nobody's death.

    Args:
        timeout: Seconds of waiting after which the workers are killed.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._workers: Sequence[Killable] = ()
        self._left = 0.0
        self._since: float | None = None
        self._timer: threading.Timer | None = None
        self.has_fired = False

    @contextmanager
    def waiting_for(self, workers: Sequence[Killable]) -> Iterator[None]:
        """Let the clock run; without workers there is nothing to watch."""
        self._workers, self._left, self.has_fired = workers, self.timeout, False
        if workers:
            self._run()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the clock stand still, if it runs."""
        was_running = self._stop()
        try:
            yield
        finally:
            if was_running and not self.has_fired:
                self._run()

    def _run(self) -> None:
        with self._lock:
            self._since = time.monotonic()
            self._timer = threading.Timer(max(0.0, self._left), self._fire)
            self._timer.daemon = True
            self._timer.start()

    def _stop(self) -> bool:
        """Stop the clock; tell whether it ran."""
        with self._lock:
            if self._timer is None or self._since is None:
                return False
            self._timer.cancel()
            self._left -= time.monotonic() - self._since
            self._timer = self._since = None
            return True

    def _fire(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # stopped in the last moment
            self.has_fired = True
            for worker in self._workers:
                worker.kill()
