import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_on_processes
from torch import multiprocessing

from e2mc_hf.data.retrying import RemoteFileError
from e2mc_hf.distributed import rank, run_on_first


def test_on_one_process_it_is_the_call():
    assert run_on_first(lambda: [1, 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        run_on_first(lambda: 1 / 0)


def remember_calls() -> tuple[object, list[int]]:
    called = []

    def action():
        called.append(rank())
        return {"rank": rank(), "tensor": torch.arange(3), "name": "ä"}

    return run_on_first(action), called


class _UnpicklableError(Exception):
    """Its arguments are not those it was made of."""

    def __init__(self, code: int, text: str):
        super().__init__(f"{text} {code}")


def refused() -> None:
    raise RemoteFileError("no such file", "https://example.org/a", 404)


def unpicklable() -> None:
    raise _UnpicklableError(7, "something")


def errors() -> list[tuple[str, str, object]]:
    """What each failing action raises here."""
    raised = []
    for action in (refused, unpicklable, threading.Lock):
        try:
            run_on_first(action)
        except Exception as error:
            raised.append((type(error).__name__, str(error), getattr(error, "status", None)))
        assert run_on_first(rank) == 0  # and the processes still understand each other
    return raised


def calls_and_errors() -> tuple[tuple[object, list[int]], list[tuple[str, str, object]]]:
    return remember_calls(), errors()


@pytest.fixture(scope="module")
def outcomes():
    return run_on_processes(calls_and_errors, 2)


def test_only_the_first_process_acts_and_all_have_the_result(outcomes):
    assert [called for (_, called), _ in outcomes] == [[0], []]
    for (result, _), _ in outcomes:
        assert (result["rank"], result["tensor"].tolist(), result["name"]) == (0, [0, 1, 2], "ä")


def test_all_processes_raise_the_error_of_the_first(outcomes):
    (_, first), (_, second) = outcomes
    assert first[0] == second[0] == ("RemoteFileError", "no such file", 404)
    # What cannot be pickled, error or result, is told in words.
    assert first[1][:2] == ("_UnpicklableError", "something 7")
    assert second[1][:2] == ("RuntimeError", "On the first process: _UnpicklableError: something 7")
    assert first[2] == second[2] == ("TypeError", "cannot pickle '_thread.lock' object", None)


def seconds_until_given_up(rank: int, folder: str) -> None:
    """Wait for a first process that takes longer than the timeout of the group."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=2)
    )
    seconds = Path(folder) / "seconds"

    def take_long() -> None:
        deadline = time.monotonic() + 20
        while not seconds.exists() and time.monotonic() < deadline:
            time.sleep(0.1)

    begin = time.monotonic()
    try:
        run_on_first(take_long)
    except RuntimeError:
        if rank == 1:
            seconds.write_text(str(time.monotonic() - begin))
    finally:
        dist.destroy_process_group()  # without it gloo's threads may abort a process that ends


def test_nobody_waits_longer_than_the_timeout_of_the_process_group():
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(seconds_until_given_up, (folder,), nprocs=2, daemon=True, start_method="spawn")
        assert 1 < float((Path(folder) / "seconds").read_text()) < 10
