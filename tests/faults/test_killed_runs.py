"""F2, F6, F29: a training that is ended at random moments goes on and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "interrupted_runs.py"
SAVE_STEPS = 3
FEW: dict[str, Any] = {
    "one process": {
        "steps": 60,
        "objective": "byol",
        "processes": 1,
        "faults": {"kill": 12, "kill at start": 4, "terminate": 2, "interrupt": 2},
    },
    "two processes": {
        "steps": 24,
        "objective": "swav",
        "processes": 2,
        "faults": {"kill": 4, "terminate": 1, "interrupt": 1},
    },
    "repeated": {
        "steps": 30,
        "objective": "swav",
        "processes": 1,
        "again": {"the same": {}, "from two workers": {"num_workers": 2}},
    },
}
MANY: dict[str, Any] = {
    "one process": {
        "steps": 700,
        "objective": "byol",
        "processes": 1,
        "faults": {"kill": 100, "kill at start": 40, "terminate": 10, "interrupt": 10},
    },
    "two processes": {
        "steps": 350,
        "objective": "swav",
        "processes": 2,
        "faults": {"kill": 60, "terminate": 10, "interrupt": 10},
    },
    "repeated": {
        "steps": 200,
        "objective": "byol",
        "processes": 1,
        "again": {"the same": {}, "from two workers": {"num_workers": 2}, "so again": {"num_workers": 2}},
    },
}


def carry_out(folder: Path, plan: dict[str, Any], timeout: float) -> dict[str, Any]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    }
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(PROGRAM), str(folder), json.dumps(plan)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return carry_out(tmp_path_factory.mktemp("few"), FEW, 500)


def outcomes(report: dict[str, Any], *kinds: str) -> list[tuple[int, dict[str, Any]]]:
    """Number of processes, and what became of a fault, for each one of some kinds."""
    return [
        (FEW[name]["processes"], outcome)
        for name, part in report.items()
        for outcome in part.get("outcomes", [])
        if outcome["kind"] in kinds
    ]


def assert_nothing_is_lost(report: dict[str, Any], plan: dict[str, Any]) -> None:
    for name, part in report.items():
        assert part["compared"] > 200, name
        assert set(part["differences"]) == {
            *plan[name].get("again", {}),
            *(["faults"] if "faults" in plan[name] else []),
        }
        assert not any(part["differences"].values()), (name, part["differences"])
        assert len(part.get("outcomes", [])) == sum(plan[name].get("faults", {}).values())
    for _, outcome in outcomes(report, "kill", "kill at start", "terminate", "interrupt"):
        assert not outcome["problem"], outcome


def test_killed_and_stopped_runs_end_as_the_unbroken_one_bit_for_bit(few: dict[str, Any]) -> None:
    assert_nothing_is_lost(few, FEW)


def test_a_kill_costs_one_save_interval_at_most(few: dict[str, Any]) -> None:
    kills = outcomes(few, "kill", "kill at start")
    assert len(kills) == 20
    assert all(0 <= outcome["step"] - outcome["began"] <= SAVE_STEPS for _, outcome in kills), kills
    assert len({outcome["step"] for _, outcome in kills}) > 8  # at many moments


def test_the_surviving_process_of_two_ends_by_itself_and_with_an_error(few: dict[str, Any]) -> None:
    lonely = [outcome for processes, outcome in outcomes(few, "kill") if len(outcome["hit"]) < processes]
    assert lonely
    for outcome in lonely:
        assert outcome["seconds"] < 60
        codes = {int(rank): code for rank, code in outcome["codes"].items()}
        (killed,) = outcome["hit"]
        assert codes[killed] == 128 + signal.SIGKILL
        assert codes[1 - killed] not in (0, 128 + signal.SIGKILL)


@pytest.mark.parametrize(("kind", "code"), [("terminate", 143), ("interrupt", 130)])
def test_a_signal_saves_within_a_step_and_every_process_exits_with_its_code(
    few: dict[str, Any], kind: str, code: int
) -> None:
    stopped = outcomes(few, kind)
    assert {processes for processes, _ in stopped} == {1, 2}
    for processes, outcome in stopped:
        assert set(outcome["codes"].values()) == {code}
        # The step may have ended between the look at it and the signal; two processes agree a step later.
        assert 0 <= outcome["began"] - outcome["step"] <= processes + 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills_cost_nothing_and_equal_runs_are_equal_after_200_steps(tmp_path: Path) -> None:
    assert_nothing_is_lost(carry_out(tmp_path, MANY, 7000), MANY)
