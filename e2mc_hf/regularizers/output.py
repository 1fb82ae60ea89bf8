"""What every regularizer returns."""

from typing import NamedTuple

from torch import Tensor


class RegularizerOutput(NamedTuple):
    """Loss to add to the objective, and its parts.

    Attributes:
        loss: Weighted sum of the terms, scalar, to be minimized.
        terms: Each term by name: scalar, unweighted, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
