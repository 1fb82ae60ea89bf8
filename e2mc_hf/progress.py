"""How far a run has come, for everything that is scheduled: momenta, warm-ups, frozen prototypes, random directions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Position in this run; an earlier run that it continues does not count.

    Attributes:
        step: Optimizer steps taken so far.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the images.
    """

    step: int = 0
    total_steps: int = 1
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> float:
        """Passes over the images so far."""
        return self.step / self.steps_per_epoch

    def cosine(self, start: float, end: float) -> float:
        """Value on half a cosine from `start` at the first step to `end` at the last."""
        fraction = min(1.0, self.step / max(1, self.total_steps - 1))
        return end - (end - start) * 0.5 * (1 + math.cos(math.pi * fraction))

    def linear(self, start: float, end: float, epochs: float) -> float:
        """Value on a line from `start` at the first step to `end` after `epochs`, and `end` from there on."""
        return end if self.epoch >= epochs else start + (end - start) * self.epoch / epochs
