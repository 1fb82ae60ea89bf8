"""F6 under real launchers: SIGTERM to a process or the launcher, Ctrl-C to everything; and the same command again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "scripts" / "continue_pretrain.py")
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [
        *(str(BIN / "torchrun"), "--nproc_per_node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0"),
    ],
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}
WORDS = [
    *("--model", "test_resnet", "--from_scratch", "--image_size", "32", "--objective_args", "projector_dim=32"),
    *("--max_samples", "640", "--max_steps", "60", "--logging_steps", "1", "--learning_rate", "0.1"),
    *("--save_strategy", "steps", "--save_steps", "50", "--disable_tqdm", "true", "--use_cpu"),
    *("--per_device_train_batch_size", "8", "--dataloader_num_workers", "1", "--resume_from_checkpoint", "auto"),
]


@pytest.fixture(autouse=True)
def as_started_from_a_shell() -> Iterator[None]:
    """Processes in the background of a shell ignore SIGINT, and so do those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(launcher: str, folder: Path) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a shell starts it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*LAUNCHERS[launcher], SCRIPT, *WORDS, "--output_dir", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(launcher: str, folder: Path) -> dict[str, torch.Tensor]:
    process = start(launcher, folder)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return load_file(folder / "model.safetensors")


def rank_one(launcher: psutil.Process) -> psutil.Process:
    """The second training process below a launcher."""
    (found,) = (
        child
        for child in launcher.children(recursive=True)
        if SCRIPT in child.cmdline() and child.environ().get("RANK") == "1"
    )
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("launcher", "target", "signum", "code", "inner_codes"),
    [
        ("python", "group", signal.SIGINT, 130, []),
        ("python", "group", signal.SIGTERM, 143, []),
        ("torchrun", "second process", signal.SIGTERM, 1, ["143", "143"]),
        ("torchrun", "launcher", signal.SIGTERM, 1, []),
        ("accelerate", "launcher", signal.SIGINT, 1, []),
    ],
)
def test_a_launched_run_saves_ends_and_goes_on(
    tmp_path: Path, launcher: str, target: str, signum: signal.Signals, code: int, inner_codes: list[str]
) -> None:
    whole = finished(launcher, tmp_path / "whole")
    process = start(launcher, tmp_path / "cut")
    assert process.stdout is not None
    while "'loss'" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    family = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    if target == "second process":
        rank_one(psutil.Process(process.pid)).send_signal(signum)
    elif target == "launcher":
        process.send_signal(signum)
    else:
        os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    assert time.monotonic() - begun < 30  # what torchrun waits before it kills
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []
    assert output.count(f"{signum.name} was received: a checkpoint will be written") == 1
    assert f"{signum.name} ended the run. Go on with --resume_from_checkpoint {tmp_path / 'cut'}/checkpoint-" in output
    assert [word for line in output.splitlines() if "exitcode  :" in line for word in line.split()[2:3]] == inner_codes
    assert "lost" not in output  # no worker
    (checkpoint,) = (tmp_path / "cut").iterdir()
    assert checkpoint.name.startswith("checkpoint-")  # and no encoder
    resumed = finished(launcher, tmp_path / "cut")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
