"""A run over many lives: begun again with what its checkpoints hold, as often as it is ended."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soaking.lives import PATIENCE, Life
from benchmarks.soaking.training import Setup
from e2mc_hf.training.checkpointing import checkpoints_of, step_of

Watch = Callable[[Life], None]
# Seconds without a step after which a life stands still.
_STANDSTILL = 120.0


class RunError(RuntimeError):
    """The training ended, or stood still, for no fault that was injected."""


@dataclass
class Run:
    """Lives of one run, one after the other.

    Args:
        setup: What is trained.
        logs: Folder for the output of each life.
        watch: Called with the life, again and again.
        own_fork_server: See `Life`.

    Attributes:
        lives: The lives so far.
        seconds_to_begin: Of the last one, from its start to its first step.
    """

    setup: Setup
    logs: Path
    watch: Watch = lambda life: None
    own_fork_server: bool = False
    lives: list[Life] = field(default_factory=list)
    seconds_to_begin: float = 0.0
    lost_saves: dict[int, int] = field(default_factory=dict)  # step of a checkpoint -> life in which it was lost

    @property
    def life(self) -> Life:
        """The one that goes on."""
        return self.lives[-1]

    def start(self) -> Life:
        """Start a life."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{len(self.lives):04}.txt"
        self.lives.append(Life(self.setup.train, self.setup.processes, log, self.own_fork_server))
        return self.life

    def begin(self) -> Life:
        """Start a life and wait until it trains.

        Raises:
            RunError: If it does not.
        """
        started = time.monotonic()
        self.start()
        if not self._wait(lambda: self.life.began >= 0, 4 * PATIENCE) or self.life.began < 0:
            self.life.end()
            raise RunError(f"life {len(self.lives) - 1} did not begin:\n{self.life.said[-3000:]}")
        self.seconds_to_begin = time.monotonic() - started
        return self.life

    def reach(self, step: int) -> None:
        """Wait until so many steps are done.

        Raises:
            RunError: If the life ends before, or stands still.
        """
        before = -1
        while before < self.life.step < step and not self.life.is_over():
            before = self.life.step
            self._wait(lambda: self.life.step >= step, _STANDSTILL)
        if self.life.step < step or any(self.life.codes.values()):
            self.life.end()
            raise RunError(f"stopped at step {self.life.step}, codes {self.life.codes}:\n{self.life.said[-3000:]}")

    def finish(self) -> Path:
        """Wait for the end of the run; its last checkpoint.

        Raises:
            RunError: If it does not end well.
        """
        self.reach(self.setup.max_steps)
        self._wait(lambda: False, PATIENCE)
        if set(self.life.codes.values()) != {0} or len(self.life.codes) < self.setup.processes:
            self.life.end()
            raise RunError(f"ended with {self.life.codes}:\n{self.life.said[-3000:]}")
        return self.setup.folder / f"checkpoint-{self.setup.max_steps}"

    def lose(self, steps: Iterable[int]) -> None:
        """Take note that the checkpoints of these steps failed, or are damaged."""
        self.lost_saves |= {step: len(self.lives) - 1 for step in steps}

    def surely_saved(self, step: int) -> int:
        """Newest step that a life which came to `step` must have saved: any before that one which was due."""
        due = range(step - 1 - (step - 1) % self.setup.save_steps, 0, -self.setup.save_steps)
        return next((one for one in due if not self._is_lost(one)), 0) if step else 0

    def _is_lost(self, step: int) -> bool:
        """Whether a checkpoint was lost, and no later life has come past it."""
        since = self.lives[self.lost_saves.get(step, len(self.lives)) + 1 :]
        return step in self.lost_saves and not any(life.began < step < life.step for life in since)

    def newest(self) -> Path:
        """Checkpoint with the highest step, whole or not."""
        return checkpoints_of(self.setup.folder)[-1]

    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, damaged or not."""
        return [step_of(path) for path in checkpoints_of(self.setup.folder)]

    def _wait(self, until: Callable[[], bool], timeout: float) -> bool:
        def look() -> bool:
            self.watch(self.life)
            return until()

        return self.life.wait(look, timeout)
