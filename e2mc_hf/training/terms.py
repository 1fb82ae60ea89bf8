"""Averages of the loss terms between two log lines."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class TermAverages:
    """Running means of named scalars; they stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count the terms of one batch."""
        for name, term in terms.items():
            value = term.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def pop(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean of each term since the last call, over all processes; a collective: every process calls it."""
        if not self._count:
            return {}
        means = mean_over_processes(torch.stack(list(self._sums.values())) / self._count)
        names = list(self._sums)
        self._sums, self._count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))
