"""SIGTERM and SIGINT end a training after a checkpoint: all processes at the same step, whichever got the signal."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.training.delayed_maximum import DelayedMaximum

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which signals are one request: `timeout -s INT` sends it to the process and again to its group.
_ONE_REQUEST = 0.5


class TrainingStopped(SystemExit):
    """A signal ended the training; left uncaught, the process exits with the code that the signal would have given it.

    Args:
        signum: The signal: SIGTERM (exit code 143) or SIGINT (130).
        checkpoint: Folder to resume from; None if there is nothing to resume.
    """

    def __init__(self, signum: int, checkpoint: str | Path | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.checkpoint = checkpoint


class StopRequests:
    """Context in which SIGTERM and SIGINT are noted instead of ending the process.

    The first signal is noted and announced in one line. A second SIGINT interrupts at once; further SIGTERMs, which
    launchers send to what was signaled already, change nothing. Signals can be handled on the main thread only:
    elsewhere, and for a signal that the process was started to ignore, the context does nothing.

    Args:
        saves: Whether a checkpoint is written before the end; for the announcement and `StopCallback`.

    Attributes:
        requested: Signal that this process got, or None.
        agreed: Signal that all processes stop for, or None.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.saves = saves
        self.requested: int | None = None
        self.agreed: int | None = None
        self._since = 0.0
        self._is_announced = False
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            # None is a handler of another language, which could not be put back.
            handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
            self._before = {s: h for s, h in handlers.items() if h not in (signal.SIG_IGN, None)}
            for signum in self._before:
                signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if error is None and self.requested is not None and self.agreed is None:
            os.kill(os.getpid(), self.requested)  # came after the last agreement: no longer held back

    def agree(self, device: torch.device) -> int | None:
        """Signal that any process got, or None; all processes must call this together, and wait for each other.

        Args:
            device: Where the backend of the processes reduces.
        """
        flag = DelayedMaximum(device)
        flag.start(self.requested or 0)
        return self._agree_on(flag.read())

    def _agree_on(self, signum: int) -> int | None:
        if signum and self.agreed is None:
            self.agreed = signum
            self._announce(signum)
        return self.agreed

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signum, now
            self._announce(signum)
        if signum == signal.SIGINT:
            if self._interrupts and now - self._since > _ONE_REQUEST:
                raise KeyboardInterrupt
            self._interrupts += 1
            self._since = now

    def _announce(self, signum: int) -> None:
        """Say it once, on the first process, in a way that is safe within a signal handler: `print` is not."""
        if self._is_announced or rank() > 0:
            return
        self._is_announced = True
        ending = "a checkpoint will be written after this step, then the run ends" if self.saves else "the run ends"
        again = " (a second one ends it at once)" if signum == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(signum).name} was received: {ending}{again}.\n".encode())


@contextmanager
def undisturbed_exit() -> Iterator[None]:
    """Let a process whose training was stopped exit with its own code.

    A launcher sends SIGTERM to what still runs once any of its processes has ended.
    """
    try:
        yield
    except TrainingStopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


class StopCallback(TrainerCallback):
    """Have all processes save the same step and stop after it, once any of them was asked to stop.

    One process reads its own request. Several learn of each other's with a delay of a step, so that none waits for the
    others or for its device; after the last step, and after an evaluation, they wait. An evaluation that is due at the
    step of the stop is left out: it may take longer than is left.

    Args:
        requests: Entered context of the training.
    """

    def __init__(self, requests: StopRequests) -> None:
        self.requests = requests
        self._flag: DelayedMaximum | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a request is known."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if self._is_to_stop(args, waits=is_last):
            control.should_evaluate = False
            self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a request came meanwhile, before another step is taken."""
        if self._is_to_stop(args, waits=True):
            self._stop(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no reduction under way, which the others would miss."""
        self._read()

    def _stop(self, control: TrainerControl) -> None:
        control.should_save = control.should_save or self.requests.saves
        control.should_training_stop = True

    def _is_to_stop(self, args: TrainingArguments, *, waits: bool) -> bool:
        """Whether the processes have agreed to stop; all of them call this together."""
        self._read()
        if self.requests.agreed is None and (waits or world_size() == 1):
            self.requests.agree(args.device)
        elif self.requests.agreed is None:
            self._flag = DelayedMaximum(args.device)
            self._flag.start(self.requests.requested or 0)
        return self.requests.agreed is not None

    def _read(self) -> None:
        """Take notice of what was under way since the step before."""
        flag, self._flag = self._flag, None
        if flag is not None:
            self.requests._agree_on(flag.read())
