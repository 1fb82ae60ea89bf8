"""Which faults of a network pass by themselves, how long to wait for that, and when to give up."""

import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # exported, by __getattr__

from e2mc_hf.errors import UsageError

logger = logging.getLogger(__name__)

# Many processes meet the same fault at once: their own draws, untouched by any seed, spread them out again.
_jitter = random.Random()


class RemoteFileError(UsageError):
    """A remote file that cannot be read, however often it is tried.

    Args:
        message: The file, what the server answered, what to do.
        url: Where the file is, without passwords and signatures.
        status: HTTP status of the answer, if there was one.
    """

    def __init__(self, message: str, url: str = "", status: int | None = None):
        super().__init__(message)
        self.url = url
        self.status = status


class RemoteFileUnreachableError(ConnectionError):
    """A server that should answer did not, for as long as the policy allows; a later run may succeed."""


class TransientError(Exception):
    """A failed request that is worth repeating.

    Args:
        cause: What happened, in a few words.
        asked_wait: Seconds the server asks to be left alone; None if it does not say.
    """

    def __init__(self, cause: str, asked_wait: float | None = None):
        super().__init__(cause)
        self.cause = cause
        self.asked_wait = asked_wait


@dataclass(frozen=True)
class RetryPolicy:
    """How long one read puts up with a bad network.

    The defaults stay below the timeout of any process group (600 s for NCCL, 1800 s under Trainer): while one process
    waits for its data, the others wait for that process. They outlast the 300 s window of the Hub's rate limits.

    Attributes:
        patience: Seconds one read may lose to faults, waits and stalled requests together; past it, it gives up. The
            last request may overrun it by `request_timeout`.
        request_timeout: Seconds without an answer, or without enough bytes of one, after which a request has stalled.
        first_wait: Seconds before the second try; doubles with every try that brings nothing.
        longest_wait: Seconds between two tries at most, unless the server asks for more.
        slowest_rate: Bytes per second below which an answer counts as stalled.
    """

    patience: float = 360.0
    request_timeout: float = 30.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    slowest_rate: float = 4096.0


def passes_by_itself(status: int) -> bool:
    """Whether an HTTP status announces a fault that a later try may not meet."""
    return status in (408, 425, 429) or (500 <= status < 600 and status not in (501, 505))


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds the headers of an answer ask to wait: Retry-After (seconds or date) or the Hub's RateLimit."""
    fields = {name.lower(): value for name, value in headers.items()}
    waits = [_seconds_of(fields["retry-after"], fields.get("date"))] if "retry-after" in fields else []
    limit = parse_ratelimit_headers(fields)
    if limit is not None and limit.remaining == 0:
        waits.append(float(limit.reset_in_seconds))
    return max((wait for wait in waits if wait is not None), default=None)


def _seconds_of(retry_after: str, date: str | None) -> float | None:
    try:
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        until = _parse_date(retry_after)
    if until is None:
        return None
    # Against the server's own clock, if it shows it: ours may be minutes off.
    now = _parse_date(date or "") or datetime.now(timezone.utc)
    return max(0.0, (until - now).total_seconds())


def _parse_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


class Patience:
    """What one read has lost to faults so far, and the wait before its next try.

    Args:
        policy: Limits.
        url: What messages call the file.
    """

    def __init__(self, policy: RetryPolicy, url: str):
        self._policy = policy
        self._url = url
        self._lost = 0.0
        self._tries = 0
        self._tries_in_vain = 0
        self._last_progress = time.monotonic()

    def progress(self) -> None:
        """Note that bytes arrived: the time until now was not lost, and the waits start small again."""
        self._last_progress = time.monotonic()
        self._tries_in_vain = 0

    def wait(self, error: TransientError) -> None:
        """Sleep before the next try, and say so in the log.

        Raises:
            RemoteFileUnreachableError: If the wait would exceed the patience of the policy.
        """
        self._lost += time.monotonic() - self._last_progress
        self._tries += 1
        seconds = self._next_wait(error)
        if self._lost + seconds > self._policy.patience:
            raise RemoteFileUnreachableError(
                f"Gave up reading {self._url} after {self._tries} failed tries and {self._lost:.0f} s; the last: "
                f"{error.cause}. The next would have been in {seconds:.0f} s, and `patience` is "
                f"{self._policy.patience:.0f} s. Try again when the server is back."
            ) from error
        logger.warning("Reading %s: %s. Try %d in %.1f s.", self._url, error.cause, self._tries + 1, seconds)
        time.sleep(seconds)
        self._lost += seconds
        self._tries_in_vain += 1
        self._last_progress = time.monotonic()

    def _next_wait(self, error: TransientError) -> float:
        if error.asked_wait is not None:
            return error.asked_wait + _jitter.uniform(0, 0.5)
        doubled = self._policy.first_wait * 2.0 ** min(self._tries_in_vain, 60)
        return min(self._policy.longest_wait, doubled) * _jitter.uniform(0.5, 1)
