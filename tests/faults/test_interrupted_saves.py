"""F1 and F5: a save that is killed at any point, or that the disk does not take, costs a save and nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLED, TOO_LARGE = 77, -25  # of the test's own, and SIGXFSZ


def report_of(*words: str) -> list[dict[str, Any]]:
    """What `interrupted_saves.py` reports."""
    outcome = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interrupted_saves.py")), *words],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith('{"name"')]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # What a resume reads of a state is its checkpoints, byte for byte: one resumed run for each that differs.
    return {line["name"]: line for line in report_of(str(tmp_path_factory.mktemp("interrupted")))}


def assert_all_resume(report: dict[str, dict[str, Any]]) -> None:
    saves, halves, sweeps = (
        [line for name, line in report.items() if name.startswith(kind)] for kind in ("point", "middle", "sweep")
    )
    # Every file is opened and synced, and the folder renamed; the last point of each row is that of no kill.
    assert len(saves) > 50
    assert len(halves) == 10
    assert len(sweeps) > 4
    for row in (saves, sweeps):
        assert [point["code"] for point in row] == [KILLED] * (len(row) - 1) + [0]
    assert {point["code"] for point in halves} == {TOO_LARGE}
    for point in (*saves, *halves, *sweeps):
        assert point["weights"] == report["unbroken"]["weights"], point["name"]
        assert point["problems"] == [], point["name"]  # no half checkpoint under the name of a whole one
        assert point["swept"] == [], point["name"]
        assert point["whole"] == max(name for name in point["left"] if name.startswith("checkpoint-")), point["name"]
    assert saves[0]["whole"] == "checkpoint-1"
    assert saves[-1]["left"] == ["checkpoint-2"]  # `save_total_limit` is honored, after the save
    assert all(point["whole"] == "checkpoint-1" for point in halves)


def test_a_save_killed_at_any_change_of_a_file_resumes_to_the_same_weights(report: dict[str, dict[str, Any]]) -> None:
    assert_all_resume(report)


@pytest.mark.slow
def test_each_point_of_a_killed_save_is_resumed(tmp_path: Path) -> None:
    assert_all_resume({line["name"]: line for line in report_of(str(tmp_path), "--resume_each")})


def of_disk(report: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if "skipped" in report[name]:
        pytest.skip(report[name]["skipped"])
    return report[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full within the 1st large file", "SafetensorError: .*No space left on device"),
        ("full within the 2nd large file", r"the disk did not take a file \(RuntimeError"),
        ("full within the 3rd large file", r"the disk did not take a file \(RuntimeError"),
        ("too full to begin", r"4\.\d MB are free, 1\.5 times the checkpoint of 3\.\d MB are needed"),
    ],
)
def test_a_full_disk_costs_one_save(report: dict[str, dict[str, Any]], name: str, message: str) -> None:
    run = of_disk(report, name)
    (failed,) = run["failed"]
    assert re.match(f"checkpoint-2: .*{message}", failed)
    assert run["left"] == ["checkpoint-3", "checkpoint-4"]  # tried again when due, and nothing half-written is left
    assert run["problems"] == [[], []]
    assert run["refusal"] == ""  # the last one was saved
    assert run["trained"] == report["unbroken"]["trained"]


def test_a_disk_that_turns_read_only_leaves_the_last_good_checkpoint_and_is_told_in_the_end(
    report: dict[str, dict[str, Any]],
) -> None:
    run = of_disk(report, "read-only")
    assert [failed.split(":")[0] for failed in run["failed"]] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert run["left"] == ["checkpoint-1"]
    assert run["problems"] == [[]]
    assert run["refusal"].startswith("`output_dir` must take the checkpoints, got 3 of 4 that could not be written")
    assert run["trained"] == report["unbroken"]["trained"]
