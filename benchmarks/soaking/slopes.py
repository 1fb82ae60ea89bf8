"""Does anything grow? Samples of the processes of a training, and the slope of each quantity over its steps."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks.soaking.lives import Life

# Largest slope in 1,000 steps, by quantity; anything else must not grow at all.
LIMITS = {"RSS, MB": 1.0}
WARM_UP = 0.2  # share of the samples that does not count
_FEWEST, _FEWEST_STEPS = 20, 1000
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Slope:
    """Growth of one quantity of one process.

    Attributes:
        process: Which one.
        quantity: What was measured.
        first: Median of the first tenth of the samples that count.
        last: Median of the last tenth.
        per_thousand: Theil-Sen slope in 1,000 steps.
        steps: Steps between the first sample and the last.
    """

    process: str
    quantity: str
    first: float
    last: float
    per_thousand: float
    steps: int

    @property
    def limit(self) -> float:
        """Largest slope that counts as none."""
        return LIMITS.get(self.quantity, 0.0)

    @property
    def grows(self) -> bool:
        """Whether it does, as far as so many steps can tell."""
        return self.steps >= _FEWEST_STEPS and self.per_thousand > self.limit


@dataclass
class Sampler:
    """Samples of one life, taken as often as it is called but not more often than the interval.

    Args:
        interval: Seconds.
        output_dir: Folder of the run, whose entries are counted.
    """

    interval: float
    output_dir: Path
    samples: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    due: float = 0.0

    def __call__(self, life: Life) -> None:
        """Measure every process of a life that trains."""
        if time.monotonic() < self.due or life.began < 0 or life.codes:
            return
        self.due = time.monotonic() + self.interval
        for rank, pid in enumerate(life.pids):
            self._measure(f"process {rank}", pid, life.step)
            for number, worker in enumerate(life.boards[rank].workers):
                self._measure(f"worker {number} of process {rank}", worker, life.step)
        self._note("output folder", "entries", life.step, len(list(self.output_dir.iterdir())))

    def slopes(self) -> list[Slope]:
        """Slope of each quantity that was sampled often enough."""
        return [slope_of(*name, samples) for name, samples in self.samples.items() if len(samples) >= _FEWEST]

    def _measure(self, name: str, pid: int, step: int) -> None:
        try:
            process = psutil.Process(pid)
            self._note(name, "RSS, MB", step, process.memory_info().rss / 1e6)
            self._note(name, "open files", step, process.num_fds())
            self._note(name, "threads", step, process.num_threads())
            self._note(name, "children", step, len(process.children(recursive=True)))
            self._note(name, "in /dev/shm", step, len(shared_memory_of(pid)))
        except (psutil.Error, OSError):
            return  # it has just ended

    def _note(self, name: str, quantity: str, step: int, value: float) -> None:
        self.samples[name, quantity].append((step, value))


def shared_memory_of(pid: int) -> set[str]:
    """Entries of /dev/shm that a process has mapped, or made: torch puts the number of the process in the name."""
    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    made = {str(path) for path in _SHARED_MEMORY.glob(f"*_{pid}_*")}
    return {path for path in mapped if path.startswith(f"{_SHARED_MEMORY}/")} | made


def slope_of(process: str, quantity: str, samples: list[tuple[int, float]]) -> Slope:
    """Theil-Sen slope of a quantity over the steps, after the warm-up."""
    counting = np.array(samples[int(WARM_UP * len(samples)) :], dtype=np.float64)
    steps, values = counting.T
    one, two = np.triu_indices(len(steps), 1)
    apart = steps[two] > steps[one]
    slopes = (values[two] - values[one])[apart] / (steps[two] - steps[one])[apart]
    tenth = max(1, len(values) // 10)
    return Slope(
        process,
        quantity,
        first=float(np.median(values[:tenth])),
        last=float(np.median(values[-tenth:])),
        per_thousand=1000 * float(np.median(slopes)) if len(slopes) else 0.0,
        steps=int(steps[-1] - steps[0]),
    )


def table(title: str, slopes: list[Slope]) -> str:
    """Lines of text, one a slope."""
    lines = [f"{title}", f"{'process':<22}{'quantity':<18}{'first':>10}{'last':>10}{'/1,000 steps':>14}{'limit':>7}"]
    for one in slopes:
        mark = "  GROWS" if one.grows else "" if one.steps >= _FEWEST_STEPS else "  too short to tell"
        lines.append(
            f"{one.process:<22}{one.quantity:<18}{one.first:>10.1f}{one.last:>10.1f}{one.per_thousand:>14.3f}"
            f"{one.limit:>7.0f}{mark}"
        )
    return "\n".join(lines)
