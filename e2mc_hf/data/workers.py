"""Worker processes that decode images: how they start, and how a user's error comes out of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

from torch import multiprocessing

from e2mc_hf.errors import UsageError


def worker_options(num_workers: int) -> dict[str, Any]:
    """Choose the DataLoader options for that many workers."""
    if num_workers == 0:
        return {"num_workers": 0}
    return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": _worker_context()}


@contextmanager
def workers_errors_as_here() -> Iterator[None]:
    """Take the message of a user's error out of the worker's traceback that torch wraps around it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).rstrip().rsplit(f"{UsageError.__name__}: ", 1)[-1]) from error


def _worker_context() -> BaseContext:
    """Start workers from a clean process: forking this one, with its threads and its GPU, can deadlock.

    The clean process imports the libraries once and forks the workers; without it (Windows) each imports them itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["e2mc_hf.data.dataset"])
    return context
