"""What goes wrong, and what has to be true afterwards."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.soaking.lives import PATIENCE
from benchmarks.soaking.run import Run, RunError
from e2mc_hf.training.checkpointing import newest_whole_checkpoint, step_of

# Bytes of room for the log, which a limit of the size of files holds for as well; and less than any file needs.
_LOG_ROOM = 16_384
_SMALL = 64


@dataclass
class Outcome:
    """One fault.

    Attributes:
        kind: Its name.
        hit: Processes that it hit.
        step: Steps done when it happened.
        began: Step that the run went on from; `step` where it was not ended.
        seconds: Until the last process had ended, or the fault was overcome.
        codes: Exit codes by rank; none if the run was not ended.
        problem: What is not as it has to be.
    """

    kind: str
    hit: list[int]
    step: int
    began: int = -1
    seconds: float = 0.0
    codes: dict[int, int] | None = None
    problem: str = ""


Fault = Callable[[Run, Random], Outcome]


def kill(run: Run, random: Random) -> Outcome:
    """SIGKILL to one process, or to all; the others must end by themselves, and no more than one interval is lost."""
    outcome = Outcome("kill", _some_of(run, random), run.life.step)
    _end(run, outcome, signal.SIGKILL)
    if outcome.codes and 0 in outcome.codes.values():
        outcome.problem += f"exit codes {outcome.codes}. "
    earliest = run.surely_saved(outcome.step)
    outcome.began = run.begin().began
    if not earliest <= outcome.began <= outcome.step:
        outcome.problem += f"went on from step {outcome.began}, {earliest} was saved. "
    return outcome


def kill_at_start(run: Run, random: Random) -> Outcome:
    """SIGKILL to all processes, and again at a random moment while they load what they go on with."""
    outcome = Outcome("kill at start", list(range(run.setup.processes)), run.life.step)
    _end(run, outcome, signal.SIGKILL)
    life = run.start()
    life.wait(timeout=random.uniform(0.0, run.seconds_to_begin))
    life.end()
    outcome.step = max(outcome.step, life.step)
    earliest = run.surely_saved(outcome.step)
    outcome.began = run.begin().began
    if not earliest <= outcome.began <= outcome.step:
        outcome.problem += f"went on from step {outcome.began}, {earliest} was saved. "
    return outcome


def terminate(run: Run, random: Random) -> Outcome:
    """SIGTERM to one process, or to all: see `_stop`."""
    return _stop(run, random, signal.SIGTERM)


def interrupt(run: Run, random: Random) -> Outcome:
    """SIGINT to one process, or to all: see `_stop`."""
    return _stop(run, random, signal.SIGINT)


def _stop(run: Run, random: Random, signum: signal.Signals) -> Outcome:
    """A checkpoint within one step, or two on several processes, and the exit code that the signal gives."""
    outcome = Outcome({signal.SIGTERM: "terminate", signal.SIGINT: "interrupt"}[signum], _some_of(run, random), 0)
    outcome.step = run.life.step
    latest = _end(run, outcome, signum) + run.setup.processes
    outcome.began = run.begin().began
    if set(outcome.codes.values() if outcome.codes else []) != {128 + signum}:
        outcome.problem += f"exit codes {outcome.codes}. "
    if not outcome.step <= outcome.began <= latest:
        outcome.problem += f"signaled at step {outcome.step}, went on from {outcome.began}. "
    return outcome


def fail_save(run: Run, random: Random) -> Outcome:
    """The operating system refuses a file of the next save: the training goes on, older checkpoints are untouched."""
    life, rank = run.life, random.randrange(run.setup.processes)
    before, began = run.saved_steps(), time.monotonic()
    room = life.log.stat().st_size + _LOG_ROOM
    life.boards[rank].limit_next_save(_SMALL if rank else random.randrange(room, 4 * room))
    run.reach(life.step + run.setup.save_steps + 1)  # the next save has been tried
    outcome = Outcome("fail save", [rank], life.step, life.step, time.monotonic() - began)
    tried = [step for step in range(max(before, default=0) + 1, life.step) if step % run.setup.save_steps == 0]
    run.lose(step for step in tried if step not in run.saved_steps())
    if not life.boards[0].failed_saves:
        outcome.problem += "no save failed. "
    if before and newest_whole_checkpoint(run.setup.folder)[0] is None:
        outcome.problem += "no whole checkpoint is left. "
    return outcome


def flip(run: Run, random: Random) -> Outcome:
    """One bit of the newest checkpoint is another one after a kill: an older one is taken, and the file is named."""
    outcome = Outcome("flip a bit", list(range(run.setup.processes)), run.life.step)
    _end(run, outcome, signal.SIGKILL)
    damaged = run.newest()
    file = random.choice([path for path in sorted(damaged.rglob("*")) if path.is_file() and path.stat().st_size])
    flip_bit(file, random)
    run.lose([step_of(damaged)])
    earliest = run.surely_saved(outcome.step)
    outcome.began = run.begin().began
    if not earliest <= outcome.began < step_of(damaged):
        outcome.problem += f"went on from step {outcome.began}, {earliest} was whole. "
    if not (damaged.name in run.life.said and file.relative_to(damaged).as_posix() in run.life.said):
        outcome.problem += f"{file} was not named. "
    return outcome


def flip_bit(file: Path, random: Random) -> None:
    """Change one bit of a file in place."""
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def lose_worker(run: Run, random: Random) -> Outcome:
    """SIGKILL to a worker that decodes: another one takes its place in the same life."""
    life = run.life
    run.reach(life.step + 1)  # the workers are known
    rank = random.randrange(run.setup.processes)
    board, began = life.boards[rank], time.monotonic()
    outcome = Outcome("lose worker", [rank], life.step, life.step)
    lost = random.choice(board.workers)
    os.kill(lost, signal.SIGKILL)
    if not life.wait(lambda: lost not in board.workers, 2 * PATIENCE) or lost in board.workers:
        raise RunError(f"the lost worker of process {rank} was not replaced: {life.codes}\n{life.said[-2000:]}")
    outcome.seconds = time.monotonic() - began
    return outcome


def _some_of(run: Run, random: Random) -> list[int]:
    """Ranks that a signal goes to: one of them, or all."""
    ranks = list(range(run.setup.processes))
    return random.choice([ranks, *([rank] for rank in ranks)])


def _end(run: Run, outcome: Outcome, signum: signal.Signals) -> int:
    """Send a signal and wait until all processes have ended; the step at which it certainly had arrived."""
    life, began = run.life, time.monotonic()
    life.send(signum, outcome.hit)
    arrived = life.step
    if not life.wait():
        outcome.problem += f"processes {set(range(life.processes)) - life.codes.keys()} did not end. "
        life.end()
    outcome.seconds, outcome.codes = max(life.ended.values()) - began, dict(life.codes)
    outcome.step = life.step if signum == signal.SIGKILL else outcome.step
    return arrived


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill at start": kill_at_start,
    "terminate": terminate,
    "interrupt": interrupt,
    "fail save": fail_save,
    "flip a bit": flip,
    "lose worker": lose_worker,
}
