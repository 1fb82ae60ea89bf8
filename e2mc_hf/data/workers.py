"""Worker processes that decode images: how they start, how they are lost, and how a user's error comes out of one."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

from torch import multiprocessing

from e2mc_hf.data.worker_watch import WorkerWatch
from e2mc_hf.errors import UsageError

# Seconds to wait for a killed process to be gone.
_PATIENCE = 5.0
# Seconds between the break of a connection and the end of the process behind it, at most.
_MOMENT = 0.4
# Seconds that a worker goes on after a SIGTERM: what the training needs for its last steps, and launchers give it.
_LAST_SECONDS = 30.0


class LostWorkersError(RuntimeError):
    """Workers died or froze."""


class UnusableWorkersError(UsageError):
    """Workers were lost again and again."""


def worker_options(num_workers: int) -> dict[str, Any]:
    """Choose the DataLoader options for that many workers."""
    if num_workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "persistent_workers": True,
        "multiprocessing_context": _worker_context(),
        "worker_init_fn": _begin,
    }


def next_batch(batches: Iterator[Any], watch: WorkerWatch) -> Any | None:
    """Take the next batch of a DataLoader's iterator; None at its end.

    Raises:
        LostWorkersError: If a worker is dead, or none has sent a batch within the time of the watch.
    """
    with lost_workers_noticed(batches, watch):
        return next(batches, None)


@contextmanager
def lost_workers_noticed(batches: Iterator[Any] | None, watch: WorkerWatch) -> Iterator[None]:
    """Watch the workers of a DataLoader's iterator, if there are any yet, while they are waited for.

    Raises:
        LostWorkersError: If a worker is dead, or the time of the watch is over.
    """
    workers = getattr(batches, "_workers", [])
    try:
        with watch.waiting_for(workers):
            yield
    except (RuntimeError, OSError, EOFError) as error:
        if watch.has_fired:
            raise LostWorkersError(f"No worker has sent a batch for {watch.timeout:g} seconds.") from error
        if _has_dead(workers):
            raise LostWorkersError(f"A worker process died ({error}).") from error
        raise


def stop_workers(batches: Iterator[Any] | None) -> None:
    """End what is left of the workers of an iterator."""
    for worker in getattr(batches, "_workers", []):
        worker.kill()
        worker.join(_PATIENCE)
    getattr(batches, "_shutdown_workers", lambda: None)()


@contextmanager
def workers_errors_as_here() -> Iterator[None]:
    """Take the message of a user's error out of the worker's traceback that torch wraps around it; keep its type."""
    try:
        yield
    except UsageError as error:
        _, found, message = str(error).rstrip().rpartition(f"{type(error).__name__}: ")
        if not found:
            raise
        raise type(error)(message) from error


def _has_dead(workers: Sequence[BaseProcess]) -> bool:
    """Whether one is dead, or is in a moment: a connection to it breaks before its end is known."""
    return bool(workers) and bool(wait([worker.sentinel for worker in workers], _MOMENT))


def _begin(worker: int) -> None:
    _leave_signals_to_the_training()
    _end_with_the_training()


def _leave_signals_to_the_training() -> None:
    """Have a worker outlive the signals that ask a training to end.

    Ctrl-C, torchrun and SLURM send them to workers too, but the training ends after its step, which needs a batch. A
    SIGTERM to a worker alone makes it a lost one, later; one from the training ends it at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_after_sigterm, name="end-after-sigterm", daemon=True).start()


def _end_after_sigterm() -> None:
    """Wait for the signal on a thread: a handler would not run while the worker is stuck in a library."""
    training = parent_process()
    received: signal.struct_siginfo | None = signal.sigwaitinfo({signal.SIGTERM})
    end = time.monotonic() + _LAST_SECONDS
    while received is not None and (training is None or received.si_pid != training.pid):
        received = signal.sigtimedwait({signal.SIGTERM}, max(0.0, end - time.monotonic()))
    os._exit(128 + signal.SIGTERM)


def _end_with_the_training() -> None:
    """Have a worker end when the training process does, however that ends.

    torch (2.15) has a worker compare its parent, which is the fork server here, and that lives as long as its workers.
    """
    training = parent_process()
    if training is not None:
        threading.Thread(target=_end_after, args=(training.sentinel,), name="end-with-training", daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _worker_context() -> BaseContext:
    """Start workers from a clean process: forking this one, with its threads and its GPU, can deadlock.

    The clean process imports the libraries once and forks the workers; without it (Windows) each imports them itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["e2mc_hf.data.dataset"])
    return context
