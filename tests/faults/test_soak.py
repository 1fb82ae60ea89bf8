"""The soak says what is so: a slope, a difference, a fault that was not survived."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.soaking.comparison import differences
from benchmarks.soaking.faults import flip_bit
from benchmarks.soaking.run import Run
from benchmarks.soaking.slopes import shared_memory_of, slope_of, table
from benchmarks.soaking.training import Setup

ROOT = Path(__file__).parents[2]


def grown(per_thousand: float, count: int = 100) -> list[tuple[int, float]]:
    """Samples of something that doubles while it warms up, and then grows, with outliers."""
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    noise[::10] += 50
    return [(100 * n, 300 + min(n, 10) * 30 + per_thousand * n / 10 + noise[n]) for n in range(count)]


@pytest.mark.parametrize("per_thousand", [0.0, 0.9, 2.0])
def test_a_slope_is_found_behind_warm_up_and_outliers(per_thousand: float) -> None:
    slope = slope_of("process 0", "RSS, MB", grown(per_thousand))
    assert slope.per_thousand == pytest.approx(per_thousand, abs=0.02)
    assert slope.grows == (per_thousand > 1)
    assert ("GROWS" in table("", [slope])) == slope.grows


def test_a_count_must_not_grow_at_all() -> None:
    assert not slope_of("process 0", "open files", [(n, 20.0) for n in range(0, 4000, 40)]).grows
    assert slope_of("process 0", "open files", [(n, 20.0 + n // 400) for n in range(0, 4000, 40)]).grows
    assert not slope_of("process 0", "open files", [(n, 20.0 + n) for n in range(0, 900, 9)]).grows  # too short to tell


def test_shared_memory_of_this_process_is_seen() -> None:
    name = f"torch_{os.getpid()}_of_this_test"
    before = shared_memory_of(os.getpid())
    Path("/dev/shm", name).touch()
    try:
        assert shared_memory_of(os.getpid()) - before == {f"/dev/shm/{name}"}
    finally:
        Path("/dev/shm", name).unlink()


def test_a_flipped_bit_of_a_checkpoint_is_a_difference(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    save_file({"weight": torch.ones(1000), "scale": torch.tensor(2.0)}, one / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": 0.1}, one / "optimizer.pt")
    (one / "trainer_state.json").write_text('{"global_step": 3, "epoch": 1, "max_steps": 9, "num_train_epochs": 3}')
    shutil.copytree(one, two)
    assert differences(one, two) == []
    save_file(
        {"weight": torch.ones(1000), "scale": torch.tensor(2.0).nextafter(torch.tensor(3.0))}, two / "model.safetensors"
    )
    torch.save({"state": {0: {"exp_avg": -torch.zeros(3)}}, "lr": 0.1}, two / "optimizer.pt")  # equal, but another bit
    (two / "more.json").write_text("{}")
    (two / "rng_state.pth").write_bytes((one / "optimizer.pt").read_bytes())
    assert sorted(differences(one, two)) == [
        "model.safetensors/scale",
        "only one has rng_state.pth/lr",
        "only one has rng_state.pth/state/0/exp_avg",
        "optimizer.pt/state/0/exp_avg",
    ]


def test_flip_bit_changes_one_bit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    flip_bit(file, Random(0))
    assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
    assert len(file.read_bytes()) == 100


def test_a_run_knows_what_it_must_have_saved(tmp_path: Path) -> None:
    run = Run(Setup(tmp_path, max_steps=100, save_steps=10), tmp_path)
    assert [run.surely_saved(step) for step in (0, 1, 10, 11, 20, 21, 35)] == [0, 0, 0, 10, 10, 20, 30]
    run.lose([20, 30])
    assert [run.surely_saved(step) for step in (11, 21, 35, 41)] == [10, 10, 10, 40]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "objective"), [("1", "swav"), ("2", "byol")])
def test_a_short_soak_survives_all_and_is_exact(processes: str, objective: str) -> None:
    options = [*("--minutes", "0.4", "--save_steps", "5", "--steps_per_fault", "8"), "--processes", processes]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *options, "--objective", objective],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3500,
        check=False,
    )
    last = done.stdout.splitlines()[-1].split()
    assert [last[0], last[3], *last[6:]] == ["injected", "survived", "exact", "yes"], done.stdout + done.stderr[-3000:]
    assert last[1] == last[4]
    assert int(last[1]) > 0
