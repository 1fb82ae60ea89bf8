"""Train, interrupt, go on, compare; print what happened as JSON. A program, for it forks trainings from one process.

    python interrupted_runs.py FOLDER '{"one": {"steps": 96, "processes": 1, "faults": {"kill": 11}}}'

Each run without faults is compared with those of `again`, which change something of it that must not matter, and with
the one that has the faults.
"""

import dataclasses
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

SAVE_STEPS = 3


def main(folder: Path, plan: dict[str, dict[str, Any]]) -> None:
    """Carry out every run of a plan."""
    from benchmarks.soaking.preparing import prepare
    from benchmarks.soaking.training import Setup

    report: dict[str, Any] = {}
    for name, wanted in plan.items():
        setup = Setup(
            folder / name / "whole",
            max_steps=wanted["steps"],
            save_steps=SAVE_STEPS if "faults" in wanted else wanted["steps"],
            objective=wanted["objective"],
            processes=wanted["processes"],
            batch_size=8,
            image_size=16,
        )
        if not report:
            prepare(setup, uses_workers="num_workers" in json.dumps(plan))
        report[name] = carry_out(setup, folder / name, wanted)
    print("\n" + json.dumps(report))


def carry_out(setup: Any, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What happened in the runs of one setup."""
    from benchmarks.soaking.comparison import compared, differences
    from benchmarks.soaking.faults import FAULTS
    from benchmarks.soaking.run import Run

    def whole(name: str, **changes: Any) -> Path:
        run = Run(dataclasses.replace(setup, folder=folder / name, **changes), folder / f"{name}-logs")
        run.begin()
        return run.finish()

    reference = whole("whole")
    report: dict[str, Any] = {"compared": compared(reference), "differences": {}}
    for name, changes in wanted.get("again", {}).items():
        report["differences"][name] = differences(whole(name, **changes), reference)
    random = Random(0)
    faults = [kind for kind, number in wanted.get("faults", {}).items() for _ in range(number)]
    if faults:
        run = Run(dataclasses.replace(setup, folder=folder / "faults"), folder / "faults-logs")
        run.begin()
        report["outcomes"] = []
        for kind in random.sample(faults, len(faults)):
            run.reach(min(run.life.began + random.randrange(6), setup.max_steps - 3))
            run.life.wait(timeout=random.uniform(0.0, 0.1))  # anywhere in a step or a save
            report["outcomes"].append(dataclasses.asdict(FAULTS[kind](run, random)))
        report["differences"]["faults"] = differences(run.finish(), reference)
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
