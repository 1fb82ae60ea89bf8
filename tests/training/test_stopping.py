"""SIGTERM and SIGINT: noted once, agreed on by all processes, and the exit code that the signal would have given."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from e2mc_hf.data.workers import stop_workers, worker_options
from e2mc_hf.distributed import rank
from e2mc_hf.training.delayed_maximum import DelayedMaximum
from e2mc_hf.training.stopping import StopCallback, StopRequests, TrainingStopped

CPU = torch.device("cpu")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        return index


@contextmanager
def handlers(*signals: int, to: Any) -> Iterator[None]:
    """Handlers of before, whatever a test leaves."""
    before = {signum: signal.signal(signum, to) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def outside() -> Iterator[list[int]]:
    """Signals that arrive outside of the trainings; processes in the background of a shell ignore SIGINT."""
    arrived: list[int] = []
    with handlers(*SIGNALS, to=lambda signum, frame: arrived.append(signum)):
        yield arrived


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_the_first_signal_is_noted_and_announced_in_one_line(
    signum: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequests() as requests:
        assert requests.requested is None
        os.kill(os.getpid(), signum)
        assert requests.requested == signum
    said = capfd.readouterr().err.strip()
    assert said.startswith(f"{name} was received: a checkpoint will be written after this step, then the run ends")
    assert "\n" not in said


def test_no_checkpoint_is_announced_where_none_will_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequests(saves=False):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.strip() == "SIGTERM was received: the run ends."


def test_a_second_sigint_interrupts_at_once() -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        assert requests.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_sent_twice_in_a_moment_is_one_request() -> None:
    with StopRequests() as requests:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.requested == signal.SIGINT


def test_further_sigterms_change_nothing_and_the_first_signal_counts(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequests() as requests:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert requests.requested == signal.SIGTERM
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_the_handlers_of_before_are_back_after_the_training(outside: list[int]) -> None:
    with pytest.raises(RuntimeError, match="an error"), StopRequests():
        raise RuntimeError("an error")
    os.kill(os.getpid(), signal.SIGTERM)
    assert outside == [signal.SIGTERM]


def test_a_signal_that_nobody_could_agree_on_any_more_is_passed_on(outside: list[int]) -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert outside == []
    assert outside == [signal.SIGTERM]
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agree(CPU) == signal.SIGTERM
    assert outside == [signal.SIGTERM]


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    with handlers(signal.SIGINT, to=signal.SIG_IGN), StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.requested is None


def test_a_training_on_another_thread_leaves_the_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        with StopRequests() as requests:
            seen.append((signal.getsignal(signal.SIGTERM), requests.agree(CPU)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_training_exits_with_the_code_of_its_signal(signum: str, code: int) -> None:
    stopped = TrainingStopped(signal.Signals[signum], Path("run/checkpoint-3"))
    assert isinstance(stopped, SystemExit)
    assert (stopped.code, stopped.checkpoint) == (code, Path("run/checkpoint-3"))


def walk(steps: int, signals: dict[tuple[int, int], int], folder: str, evaluations: tuple[int, ...] = ()) -> Any:
    """Take the steps of a training as transformers does, with signals to (rank, step); where it ends, and why.

    Returns:
        Last step, the steps that were saved, signal agreed on, whether an evaluation was left out.
    """
    args = TrainingArguments(output_dir=folder, use_cpu=True, report_to=[])
    state, control, saved, left_out = TrainerState(max_steps=steps), TrainerControl(), [], False
    with handlers(*SIGNALS, to=signal.default_int_handler), StopRequests() as requests:
        callback = StopCallback(requests)
        while state.global_step < steps and not control.should_training_stop:
            control.should_save = False
            state.global_step += 1
            control.should_evaluate = due = state.global_step in evaluations
            if (signum := signals.get((rank(), state.global_step))) is not None:
                os.kill(os.getpid(), signum)
            callback.on_step_end(args, state, control)
            left_out |= due and not control.should_evaluate
            if control.should_evaluate:
                if (signum := signals.get((rank(), -state.global_step))) is not None:
                    os.kill(os.getpid(), signum)
                callback.on_evaluate(args, state, control)
            if control.should_save:
                saved.append(state.global_step)
        callback.on_train_end(args, state, control)
        assert callback._flag is None
        return state.global_step, saved, requests.agree(args.device), left_out


def test_one_process_saves_and_stops_at_the_very_step(tmp_path: Path) -> None:
    for step in (1, 3, 5):
        assert walk(5, {(0, step): signal.SIGINT}, str(tmp_path)) == (step, [step], signal.SIGINT, False)
    assert walk(5, {}, str(tmp_path)) == (5, [], None, False)


def test_an_evaluation_due_at_the_stop_is_left_out_and_one_under_way_ends_the_run(tmp_path: Path) -> None:
    assert walk(5, {(0, 2): signal.SIGTERM}, str(tmp_path), (2,)) == (2, [2], signal.SIGTERM, True)
    assert walk(5, {(0, -2): signal.SIGTERM}, str(tmp_path), (2,)) == (2, [2], signal.SIGTERM, False)


CASES: dict[str, tuple[dict[tuple[int, int], int], tuple[int, ...], tuple[int, int | None]]] = {
    "nobody": ({}, (), (5, None)),
    "only the second": ({(1, 2): signal.SIGTERM}, (), (3, signal.SIGTERM)),
    "only the first": ({(0, 1): signal.SIGINT}, (), (2, signal.SIGINT)),
    "both at different steps": ({(0, 2): signal.SIGINT, (1, 3): signal.SIGTERM}, (), (3, signal.SIGINT)),
    "both at once": ({(0, 2): signal.SIGINT, (1, 2): signal.SIGTERM}, (), (3, signal.SIGTERM)),
    "before the last step": ({(1, 4): signal.SIGTERM}, (), (5, signal.SIGTERM)),
    "at the last step": ({(1, 5): signal.SIGTERM}, (), (5, signal.SIGTERM)),
    "in an evaluation": ({(1, -3): signal.SIGTERM}, (3,), (3, signal.SIGTERM)),
}


def stop_together(folder: str) -> Any:
    walked = {name: walk(5, signals, folder, steps) for name, (signals, steps, _) in CASES.items()}
    flags = [DelayedMaximum(CPU) for _ in range(3)]
    for number, flag in enumerate(flags):  # several under way at once
        flag.start(number + 10 * rank())
    return walked, [flag.read() for flag in flags]


def test_processes_stop_together_one_step_later_whoever_got_the_signal(tmp_path: Path) -> None:
    first, second = run_on_processes(stop_together, 2, str(tmp_path))
    assert first == second
    walked, maxima = first
    assert maxima == [10, 11, 12]
    for name, (_, _, (step, signum)) in CASES.items():
        assert walked[name] == (step, [step] if signum else [], signum, False), name


@pytest.mark.skipif(sys.platform != "linux", reason="the sender of a signal is known on Linux only")
def test_workers_outlive_the_signals_that_end_a_training_but_not_one_from_it() -> None:
    batches: Any = iter(DataLoader(Numbers(), batch_size=1, **worker_options(2)))
    assert [next(batches).item(), next(batches).item()] == [0, 1]  # one of each worker: both have begun
    workers = batches._workers
    for signum in ("INT", "TERM"):  # from another process than this one
        subprocess.run(["kill", f"-{signum}", *(str(worker.pid) for worker in workers)], check=True)
    workers[0].join(1)
    assert [next(batches).item() for _ in range(50)] == list(range(2, 52))
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(5)
    assert [worker.is_alive() for worker in workers] == [False, True]
    stop_workers(batches)
