"""Two processes save together or not at all, resume from the same checkpoint, and change their number (F10)."""

import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_processes
from training.tiny_runs import BATCH, STEPS, same, tiny_run, weights
from transformers import TrainerCallback

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.errors import UsageError
from e2mc_hf.training import checkpointing
from e2mc_hf.training.manifest import read_manifest
from e2mc_hf.training.stopping import TrainingStopped
from e2mc_hf.training.trainer import E2MCTrainer

FLOAT_ERROR = 1e-5  # the sums over a batch are of other parts


class Before(TrainerCallback):
    """Forbids a process to write files beyond a size, before the save of a step."""

    def __init__(self, limits: dict[int, int]) -> None:
        self.limits = limits

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.limits:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limits[state.global_step], most))


def run(folder: Path, **options: Any) -> E2MCTrainer:
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size()), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used
    return tiny_run(folder, per_device_train_batch_size=BATCH // world_size(), **options)


def unbroken(folder: Path) -> dict[str, Any]:
    """Saves of two processes; then the newest checkpoint loses what only the second process reads."""
    trainer = run(folder / "whole", save_total_limit=None)
    trainer.train()
    ends = weights(trainer)
    dist.barrier()
    if rank() == 0:
        for step in (1, 2, 3):
            shutil.copytree(folder / "whole" / f"checkpoint-{step}", folder / "cut" / f"checkpoint-{step}")
        (folder / "cut" / "checkpoint-3" / "rng_state_1.pth").unlink()
    dist.barrier()
    resumed = run(folder / "cut")
    begun = resumed.checkpoint_to_resume("auto")
    resumed.train(begun)
    manifest = read_manifest(folder / "whole" / f"checkpoint-{STEPS}")
    return {"ends": ends, "manifest": manifest, "begun": begun, "same": same(weights(resumed), ends)}


def one_cannot_write(folder: Path, process: int, limit: int) -> dict[str, Any]:
    """A process fails at step 2, in the middle of a file."""
    trainer = run(folder, save_total_limit=None)
    if rank() == process:
        trainer.add_callback(Before({2: limit, 3: resource.RLIM_INFINITY}))
    trainer.train()
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    trainer.refuse_failed_save()
    return {"failed": trainer.failed_saves, "left": left, "ends": weights(trainer)}


def not_shared(folder: Path) -> dict[str, str]:
    """Each process has an output folder of its own, as on nodes without a common file system."""
    checkpointing._PATIENCE = 0.5
    told = {}
    for name, options in (("at the start", {}), ("at a save", {"save_strategy": "no"})):
        trainer = run(folder / f"node-{rank()}", **options)
        trainer.add_callback(SignalAt(2))
        try:
            trainer.train()
        except UsageError as error:
            told[name] = str(error)
        except TrainingStopped as stopped:
            told[name] = f"{stopped.code} {stopped.checkpoint} {trainer.failed_saves}"
    return told


class SignalAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def all_cases(folder: str) -> dict[str, Any]:
    path = Path(folder)
    return {
        "unbroken": unbroken(path),
        "rng": one_cannot_write(path / "rng", 1, 1 << 12),
        "weights": one_cannot_write(path / "weights", 0, 1 << 20),
        "not shared": not_shared(path / "not_shared"),
        "of one": of_one(path),
    }


def of_one(folder: Path) -> dict[str, Any]:
    """Two processes go on with what one has saved."""
    if rank() == 0:
        shutil.copytree(folder / "one" / "checkpoint-2", folder / "of_one" / "checkpoint-2")
    dist.barrier()
    trainer = run(folder / "of_one")
    trainer.train("auto")
    return {"ends": weights(trainer)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Weights that one process ends with, whose checkpoints stay in `one`."""
    trainer = tiny_run(folder / "one", save_total_limit=None)
    trainer.train()
    return weights(trainer)


@pytest.fixture(scope="module")
def outcomes(folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    return run_on_processes(all_cases, 2, str(folder))


def close(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(tensor, second[name], rtol=FLOAT_ERROR, atol=FLOAT_ERROR) for name, tensor in first.items()
    )


def test_a_checkpoint_of_two_processes_has_the_random_state_of_each(outcomes: list[dict[str, Any]]) -> None:
    manifest = outcomes[0]["unbroken"]["manifest"]
    assert manifest["processes"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} < manifest["files"].keys()


def test_both_resume_from_the_newest_that_is_whole_for_all(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["unbroken"]["begun"].endswith("checkpoint-2")
        assert outcome["unbroken"]["same"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rng", r"checkpoint-2: process 1: (the disk did not take a file|RuntimeError|OSError)"),
        ("weights", r"checkpoint-2: process 0: SafetensorError: .*File too large"),
    ],
)
def test_neither_counts_a_save_that_one_could_not_write_and_both_go_on(
    outcomes: list[dict[str, Any]], case: str, message: str
) -> None:
    for outcome in outcomes:
        (failed,) = outcome[case]["failed"]
        assert re.match(message, failed), failed
        assert outcome[case]["left"] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
        assert same(outcome[case]["ends"], outcome["unbroken"]["ends"])


def test_a_folder_that_is_not_shared_is_refused_when_checkpoints_are_due(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        told = outcome["not shared"]["at the start"]
        assert told.startswith("`output_dir` must be one folder that all processes share, got ")
        assert "where processes 1 do not see what process 0 writes" in told


def test_a_folder_that_is_not_shared_fails_the_save_of_a_signal_and_nobody_hangs(
    outcomes: list[dict[str, Any]],
) -> None:
    for outcome in outcomes:
        told = outcome["not shared"]["at a save"]
        assert told.startswith("143 None")
        assert "checkpoint-3: process 1: FileNotFoundError" in told
        assert "share `output_dir`" in told


def test_two_processes_go_on_with_what_one_saved(outcomes: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert close(outcomes[0]["of one"]["ends"], alone)
    assert same(outcomes[0]["of one"]["ends"], outcomes[1]["of one"]["ends"])


def test_one_process_goes_on_with_what_two_saved(
    outcomes: list[dict[str, Any]], folder: Path, alone: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "of_two" / "checkpoint-2")
    trainer = tiny_run(folder / "of_two")
    trainer.train("auto")
    assert close(weights(trainer), alone)
    assert close(weights(trainer), outcomes[0]["unbroken"]["ends"])
    assert "1 processes go on with what 2 had saved" in caplog.text
