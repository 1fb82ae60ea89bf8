"""Train for half an hour while things go wrong, and compare with the run in which nothing does.

    python -m benchmarks.soak [--minutes 30] [--processes 2] [--num_workers 2] [--objective byol] [--output_dir DIR]

Start it in the root of the repository, with OMP_NUM_THREADS=1.

A ResNet of 0.4 million parameters learns SwAV with a queue (or BYOL with a teacher) and the E2MC regularizer from
scanned digits, on the CPU. About once in 200 steps, at a random moment, one of these happens:

  kill           SIGKILL to one process or to all of them
  kill at start  SIGKILL to all, and again while the run that goes on is being set up
  terminate      SIGTERM to one process or to all of them
  interrupt      SIGINT, likewise
  fail save      the operating system refuses a file of the next checkpoint (RLIMIT_FSIZE)
  flip a bit     SIGKILL, and a random bit of a random file of the newest checkpoint is another one
  lose worker    SIGKILL to a process that decodes images, if there are any

and the same command, `--resume_from_checkpoint auto`, goes on. Each fault is survived if what faults.py says is true
afterwards. One image of the data set is broken; it counts as a fault each time that it is met. It is as broken in the
run without faults, for a stand-in is another image. In the end that run takes as many steps in one life, and the last
checkpoints of both are compared bit for bit: weights, teacher or queue, optimizer, schedule, random states, counts.

Memory, open files, threads and children of all processes are sampled in the run without faults, and in the longest
life of the other one. The last line is

    injected N / survived N / exact yes|no

and the exit code 0 only if all were survived, the end is exact, and nothing grows. This takes about twice --minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    from benchmarks.soaking.faults import Outcome
    from benchmarks.soaking.run import Run
    from benchmarks.soaking.training import Setup

# Everything heavy is imported in functions: processes that decode images import this file.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training with faults")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--num_workers", type=int, default=1, help="processes of each process that decode")
    parser.add_argument("--objective", default="swav", choices=("swav", "byol"))
    parser.add_argument("--steps_per_fault", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--output_dir", type=Path, help="is kept; without it nothing is")
    options = parser.parse_args()
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True)
        return soak(options, options.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        return soak(options, Path(folder))


def soak(options: argparse.Namespace, folder: Path) -> int:
    from random import Random

    from benchmarks.soaking.comparison import compared, differences, unreadable_images
    from benchmarks.soaking.lives import Life
    from benchmarks.soaking.preparing import prepare
    from benchmarks.soaking.run import Run
    from benchmarks.soaking.slopes import Sampler, table
    from benchmarks.soaking.training import Setup

    def setup(name: str, steps: int) -> Setup:
        return Setup(
            folder / name,
            max_steps=steps,
            save_steps=options.save_steps,
            objective=options.objective,
            num_workers=options.num_workers,
            processes=options.processes,
        )

    prepare(setup("prepared", 1), uses_workers=options.num_workers > 0)
    steps = steps_in(options, setup("timed", 4 * options.save_steps), folder / "timed-logs")
    print(f"{steps:,} steps, {vars(options)}", flush=True)
    began, interval = time.monotonic(), max(0.2, options.minutes / 30)
    samplers: dict[int, Sampler] = {}

    def watch(life: Life) -> None:
        samplers.setdefault(id(life), Sampler(interval, folder / "faults"))(life)

    faulty = Run(setup("faults", steps), folder / "faults-logs", watch)
    outcomes, end = go_through(faulty, schedule(options, steps, Random(options.seed)), Random(options.seed + 1))
    took = time.monotonic() - began
    trained = sum(max(0, life.step - life.began) for life in faulty.lives)
    print(f"with faults: {took / 60:.1f} min, {len(faulty.lives)} lives, {trained:,} steps for {steps:,}")
    print(summary(outcomes), flush=True)

    sampler = Sampler(interval, folder / "whole")
    whole = Run(setup("whole", steps), folder / "whole-logs", sampler, own_fork_server=True)
    whole.begin()
    reference = whole.finish()
    longest = max(faulty.lives, key=lambda life: life.step - life.began)
    slopes = sampler.slopes()
    print("\n" + table(f"without faults, one life of {steps:,} steps", slopes))
    length = longest.step - longest.began
    print("\n" + table(f"with faults, the longest life, {length:,} steps", samplers[id(longest)].slopes()))

    different = differences(end, reference) if end is not None else ["it did not come to its end"]
    unreadable = unreadable_images(reference)
    print(
        f"\nbroken images met: {unreadable}; {compared(reference):,} values compared, different: {different or 'none'}"
    )
    injected = len(outcomes) + unreadable
    survived = injected - sum(bool(outcome.problem) for outcome in outcomes)
    exact = not different
    print(f"injected {injected} / survived {survived} / exact {'yes' if exact else 'no'}")
    return int(not (survived == injected and exact and not any(slope.grows for slope in slopes)))


def steps_in(options: argparse.Namespace, setup: "Setup", logs: Path) -> int:
    """Steps that fit into the time, by those of a short run: faults cost a restart and half an interval each."""
    from benchmarks.soaking.run import Run

    run, began = Run(setup, logs), time.monotonic()
    run.begin()
    restart = time.monotonic() - began
    run.reach(setup.save_steps)
    began = time.monotonic()
    run.finish()
    step = (time.monotonic() - began) / (setup.max_steps - setup.save_steps)
    return max(
        6 * options.save_steps,
        int(60 * options.minutes / (step + (restart + step * options.save_steps) / options.steps_per_fault)),
    )


def schedule(options: argparse.Namespace, steps: int, random: "Random") -> list[tuple[int, str]]:
    """One fault in so many steps, at a random one of them; every kind as often, in random order."""
    from benchmarks.soaking.faults import FAULTS

    kinds = [kind for kind in FAULTS if kind != "lose worker" or options.num_workers]
    number = (steps - 4 * options.save_steps) // options.steps_per_fault
    drawn = [kind for start in range(0, number, len(kinds)) for kind in random.sample(kinds, len(kinds))]
    begin = 2 * options.save_steps  # so that there are two checkpoints
    return [
        (begin + options.steps_per_fault * place + random.randrange(options.steps_per_fault), kind)
        for place, kind in enumerate(drawn[:number])
    ]


def go_through(run: "Run", faults: list[tuple[int, str]], random: "Random") -> "tuple[list[Outcome], Path | None]":
    """Inject faults at their steps; what became of each, and the last checkpoint if the run comes to its end."""
    from benchmarks.soaking.faults import FAULTS, Outcome
    from benchmarks.soaking.run import RunError

    outcomes: list[Outcome] = []
    try:
        run.begin()
        for step, kind in faults:
            run.reach(step)
            time.sleep(random.uniform(0.0, 0.2))  # a step and a save take less
            try:
                outcomes.append(FAULTS[kind](run, random))
            except RunError as error:
                outcomes.append(Outcome(kind, [], step, problem=str(error)))
                run.begin()
            if outcomes[-1].problem:
                print(f"NOT SURVIVED: {outcomes[-1]}", flush=True)
        return outcomes, run.finish()
    except RunError as error:
        print(f"THE RUN ENDED: {error}", flush=True)
        return outcomes, None


def summary(outcomes: "list[Outcome]") -> str:
    """One line for each kind of fault."""
    lines = [f"{'fault':<14}{'injected':>9}{'survived':>9}{'steps lost':>12}{'seconds':>9}   (mean)"]
    for kind in sorted({outcome.kind for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        survived = sum(not outcome.problem for outcome in own)
        lost = sum(max(0, outcome.step - outcome.began) for outcome in own) / len(own)
        seconds = sum(outcome.seconds for outcome in own) / len(own)
        lines.append(f"{kind:<14}{len(own):>9}{survived:>9}{lost:>12.1f}{seconds:>9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
