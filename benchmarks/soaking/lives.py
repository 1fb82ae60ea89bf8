"""Processes of a training that may be ended at any time: forked from one that has imported everything, in no time.

A life is one start of a training, on one process or on several that talk through gloo. What its processes tell stays
in shared memory, whatever ends them.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Seconds between two looks at a life, and until a life that was to end counts as hung.
LOOK = 0.004
PATIENCE = 60.0
_PR_SET_PDEATHSIG = 1
_MOST_WORKERS = 8


class Board:
    """What one process tells: numbers in shared memory.

    Attributes:
        numbers: began, step, failed saves, file size limit of the next save, process ids of the loader's workers.
    """

    def __init__(self) -> None:
        self.numbers = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.int64)[: 4 + _MOST_WORKERS]
        self.numbers[0] = -1

    @property
    def began(self) -> int:
        """Step that the training began from; -1 before it has."""
        return int(self.numbers[0])

    @property
    def step(self) -> int:
        """Steps done, counted from the start of the whole run."""
        return int(self.numbers[1])

    @property
    def failed_saves(self) -> int:
        """Saves of this life that failed."""
        return int(self.numbers[2])

    @property
    def workers(self) -> list[int]:
        """Process ids of the loader's workers."""
        return [int(pid) for pid in self.numbers[4:] if pid]

    def tell_begin(self, step: int) -> None:
        """Say that the training begins."""
        self.numbers[1] = step
        self.numbers[0] = step

    def tell_step(self, step: int, workers: list[int]) -> None:
        """Say that a step was done."""
        self.numbers[4 : 4 + len(workers)] = workers
        self.numbers[1] = step

    def tell_failed_save(self) -> None:
        """Say that a save failed."""
        self.numbers[2] += 1

    def limit_next_save(self, size: int) -> None:
        """Have the next save of this process fail once a file of it is so large, in bytes."""
        self.numbers[3] = size

    def take_limit(self) -> int:
        """Limit of the save that begins now; 0 for none."""
        limit, self.numbers[3] = int(self.numbers[3]), 0
        return limit


Training = Callable[[Board], object]


@dataclass
class Life:
    """One start of a training.

    Args:
        training: What each process does.
        processes: How many.
        log: File that takes all their output.
        own_fork_server: Whether each process forks its workers from a server of its own, which has to import
            everything first, and not from that of this process.
    """

    training: Training
    processes: int
    log: Path
    own_fork_server: bool = False
    boards: list[Board] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # exit codes by rank, as a shell gives them
    ended: dict[int, float] = field(default_factory=dict)  # when, on the monotonic clock

    def __post_init__(self) -> None:
        self.boards = [Board() for _ in range(self.processes)]
        environment = _environment(self.processes)
        for rank in range(self.processes):
            pid = os.fork()
            if pid == 0:
                os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {})
                self._be_born(self.boards[rank])
            self.pids.append(pid)

    @property
    def began(self) -> int:
        """Step that the training began from; -1 if not all processes have begun."""
        return min(board.began for board in self.boards)

    @property
    def step(self) -> int:
        """Steps that any process has done."""
        return max(board.step for board in self.boards)

    @property
    def said(self) -> str:
        """All output so far."""
        return self.log.read_text(errors="replace")

    def is_over(self) -> bool:
        """Look whether all processes have ended."""
        for rank, pid in enumerate(self.pids):
            if rank in self.codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                self.codes[rank], self.ended[rank] = code if code >= 0 else 128 - code, time.monotonic()
        return len(self.codes) == self.processes

    def wait(self, until: Callable[[], bool] = lambda: False, timeout: float = PATIENCE) -> bool:
        """Wait until something is so, or all processes have ended; False if neither happens in time."""
        end = time.monotonic() + timeout
        while not (until() or self.is_over()):
            if time.monotonic() > end:
                return False
            time.sleep(LOOK)
        return True

    def send(self, signum: int, ranks: list[int] | None = None) -> None:
        """Send a signal to some processes, or to all."""
        for rank in range(self.processes) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], signum)

    def end(self) -> None:
        """Kill what is left."""
        self.send(signal.SIGKILL)
        assert self.wait(), "a killed process does not end"

    def _be_born(self, board: Board) -> None:
        """Train in this process, which is a fork, and end it."""
        code = 1
        try:
            _leave_the_parent(self.log, own_fork_server=self.own_fork_server)
            self.training(board)
            code = 0
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _leave_the_parent(log: Path, *, own_fork_server: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    torch.set_num_threads(1)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if own_fork_server:
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
    else:
        server.ensure_running = lambda: None  # it is, but not as a child of this process, which could ask after it


def _environment(processes: int) -> dict[str, str]:
    """What a launcher would say to all processes; nothing to a single one."""
    if processes == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(processes)
    return {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def start_fork_server() -> None:
    """Start the process that the workers of all lives are forked from.

    What it says is dropped: of workers whose life was killed while they started, of semaphores that killed lives left.
    """
    multiprocessing.set_forkserver_preload(["e2mc_hf.data.dataset"])
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(nowhere)
