"""Read the next block while the present one is used."""

import weakref
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# Longest wait for a reader to see that it is to end, in seconds; one that hangs in a read is left behind.
_PATIENCE = 2.0


class ReadAhead(Generic[T]):
    """Blocks of consecutive items, each read by a thread of its own while the one before it is used.

    At most two blocks are held: the one last taken and the next. What the items raise is raised where a block is taken.
    The thread ends with the last block, with `close`, with this object, or with the interpreter: a thread in the midst
    of a read when the interpreter goes would abort it.

    Args:
        items: What to read; closed by the thread, wherever it ends.
        sizes: Items of each block.
    """

    def __init__(self, items: Generator[T, None, None], sizes: Iterable[int]) -> None:
        self._blocks: SimpleQueue[list[T] | BaseException | None] = SimpleQueue()
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._ended = False
        stopped = Event()
        # The thread must not hold this object, or it would never be collected.
        thread = Thread(
            target=_read, args=(items, sizes, self._blocks, self._wanted, stopped), name="read-ahead", daemon=True
        )
        self._stop = weakref.finalize(self, _stop, thread, self._wanted, stopped)
        self._wanted.put(True)
        thread.start()

    def __iter__(self) -> "ReadAhead[T]":
        return self

    def __next__(self) -> list[T]:
        """Take the next block, and have the one after it read."""
        block = None if self._ended else self._blocks.get()
        if isinstance(block, list):
            self._wanted.put(True)
            return block
        self._ended = True
        if block is None:
            raise StopIteration
        try:
            raise block
        finally:
            del block  # the error holds this frame

    def close(self) -> None:
        """End the thread; there are no more blocks."""
        self._ended = True
        self._stop()

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read(
    items: Generator[T, None, None],
    sizes: Iterable[int],
    blocks: "SimpleQueue[list[T] | BaseException | None]",
    wanted: "SimpleQueue[bool]",
    stopped: Event,
) -> None:
    """Put blocks of items into a queue, one for each that is wanted; then None, or what went wrong."""
    try:
        with closing(items):
            for size in sizes:
                if not wanted.get():
                    return
                block = []
                for item in islice(items, size):
                    if stopped.is_set():
                        return
                    block.append(item)
                blocks.put(block)
        blocks.put(None)
    except BaseException as error:
        blocks.put(error)


def _stop(thread: Thread, wanted: "SimpleQueue[bool]", stopped: Event) -> None:
    """Wake and end a reader; also called by the garbage collector, in whichever thread that runs."""
    stopped.set()
    wanted.put(False)
    if thread is not current_thread():
        thread.join(_PATIENCE)
