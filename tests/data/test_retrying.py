import logging
import pickle
import re
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2mc_hf.data.remote_files import DEFAULT_POLICY
from e2mc_hf.data.retrying import (
    Patience,
    RemoteFileError,
    RemoteFileUnreachableError,
    RetryPolicy,
    TransientError,
    asked_wait,
    passes_by_itself,
)
from e2mc_hf.errors import UsageError

URL = "https://example.org/a.parquet"
NCCL_TIMEOUT = 600  # seconds; the shortest default of a process group
HUB_WINDOW = 300  # seconds in which the Hub counts requests


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 529, 599])
def test_a_busy_or_broken_server_is_asked_again(status):
    assert passes_by_itself(status)


@pytest.mark.parametrize("status", [200, 206, 301, 400, 401, 403, 404, 405, 410, 416, 451, 501, 505, 600])
def test_a_refusal_is_final(status):
    assert not passes_by_itself(status)


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 07:27:50 GMT"}, 10),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 07:29:00 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"RateLimit": '"api";r=12;t=55'}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "60"}, 60),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "5"}, 55),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_the_wait_a_server_asks_for_is_read_from_its_headers(headers, seconds):
    assert asked_wait(headers) == seconds


def test_a_date_without_the_servers_clock_is_measured_against_ours():
    assert asked_wait({"Retry-After": in_seconds(20)}) == pytest.approx(20, abs=1)


@given(st.dictionaries(st.sampled_from(["Retry-After", "Date", "RateLimit"]), st.text(max_size=40)))
def test_no_header_breaks_the_reading_of_headers(headers):
    seconds = asked_wait(headers)
    assert seconds is None or seconds >= 0


def announced_waits(caplog: pytest.LogCaptureFixture) -> list[float]:
    """Seconds of each wait, as logged before it."""
    return [record.args[-1] for record in caplog.records]


def test_waits_double_up_to_the_longest(caplog):
    patience = Patience(RetryPolicy(first_wait=0.01, longest_wait=0.05), URL)
    for _ in range(5):
        patience.wait(TransientError("status 503"))
    for wait, longest in zip(announced_waits(caplog), [0.01, 0.02, 0.04, 0.05, 0.05], strict=True):
        assert longest / 2 <= wait <= longest


def test_after_progress_the_waits_start_small_again(caplog):
    patience = Patience(RetryPolicy(first_wait=0.01, longest_wait=10), URL)
    for _ in range(4):
        patience.wait(TransientError("status 503"))
    patience.progress()
    patience.wait(TransientError("status 503"))
    assert announced_waits(caplog)[3] >= 0.04
    assert announced_waits(caplog)[4] <= 0.01


def test_processes_that_fail_together_do_not_come_back_together(caplog):
    for _ in range(20):
        Patience(RetryPolicy(first_wait=0.01), URL).wait(TransientError("status 503"))
    assert len(set(announced_waits(caplog))) == 20


def test_the_wait_a_server_asks_for_is_kept_within_a_second(caplog):
    begin = time.monotonic()
    Patience(RetryPolicy(first_wait=0.01, longest_wait=0.02), URL).wait(TransientError("status 429", 0.3))
    assert time.monotonic() - begin >= 0.3
    assert 0.3 <= announced_waits(caplog)[0] <= 1.3


def test_a_wait_beyond_the_patience_is_not_begun():
    begin = time.monotonic()
    with pytest.raises(
        RemoteFileUnreachableError, match=r"a.parquet after 1 failed tries and 0 s; the last: status 429"
    ):
        Patience(RetryPolicy(patience=60), URL).wait(TransientError("status 429", 61.0))
    assert time.monotonic() - begin < 1


def test_all_waits_together_stay_within_the_patience(caplog):
    patience = Patience(RetryPolicy(patience=0.3, first_wait=0.01, longest_wait=0.04), URL)

    def keep_trying():
        while True:
            patience.wait(TransientError("reset"))

    with pytest.raises(RemoteFileUnreachableError, match=r"after \d+ failed tries and 0 s; the last: reset"):
        keep_trying()
    assert sum(announced_waits(caplog)) <= 0.3
    assert len(caplog.records) >= 3


def test_time_lost_in_stalled_requests_counts():
    patience = Patience(RetryPolicy(patience=0.2, first_wait=0.01), URL)
    time.sleep(0.25)
    with pytest.raises(RemoteFileUnreachableError):
        patience.wait(TransientError("no answer"))


def test_time_spent_on_receiving_does_not_count():
    patience = Patience(RetryPolicy(patience=0.2, first_wait=0.01), URL)
    time.sleep(0.25)
    patience.progress()
    patience.wait(TransientError("reset"))


def test_every_wait_is_one_warning_with_file_cause_try_and_seconds(caplog):
    patience = Patience(RetryPolicy(first_wait=0.01), URL)
    for cause in ("status 503", "reset"):
        patience.wait(TransientError(cause, 0.0))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert re.fullmatch(f"Reading {URL}: status 503. Try 2 in 0\\.\\d s\\.", caplog.messages[0])
    assert re.fullmatch(f"Reading {URL}: reset. Try 3 in 0\\.\\d s\\.", caplog.messages[1])


def test_by_default_a_read_gives_up_before_any_process_group_but_after_the_hubs_window():
    assert HUB_WINDOW + 1 < DEFAULT_POLICY.patience < NCCL_TIMEOUT - DEFAULT_POLICY.request_timeout


def test_a_refused_file_is_a_usage_error_that_travels_between_processes():
    error = pickle.loads(pickle.dumps(RemoteFileError("no such file", URL, 404)))
    assert isinstance(error, UsageError)
    assert (str(error), error.url, error.status) == ("no such file", URL, 404)


def test_an_unreachable_server_is_no_usage_error():
    error = pickle.loads(pickle.dumps(RemoteFileUnreachableError("gave up")))
    assert isinstance(error, ConnectionError)
    assert not isinstance(error, UsageError)
