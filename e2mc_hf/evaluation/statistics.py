"""Accuracies with the error they carry, and differences between two encoders that saw the same labels and images.

All numbers are fractions in [0, 1]; percent points are made where they are printed.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from e2mc_hf.arguments import require

ErrorSource = Literal["draws", "test images"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The accuracy of one encoder under one protocol.

    Attributes:
        name: Protocol.
        values: Accuracy of each draw of the labels; one number when all labels are used.
        correct: Whether each test image was classified correctly, for each draw.
        strengths: Strength the probe chose in each draw; empty for protocols without one.
        converged: Whether each fit met its tolerance; empty for protocols without a fit.
        num_labels: Labels the classifier got in each draw.
    """

    name: str
    values: tuple[float, ...]
    correct: Bool[np.ndarray, "draws images"]
    strengths: tuple[float, ...] = ()
    converged: tuple[bool, ...] = ()
    num_labels: int = 0

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.correct) > 0

    @property
    def num_draws(self) -> int:
        """Number of draws of the labels."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Accuracy, averaged over the draws."""
        return float(np.mean(self.values))

    @property
    def over(self) -> ErrorSource:
        """What the standard error is over: draws when there are two or more, test images otherwise."""
        return "draws" if self.num_draws > 1 else "test images"

    @property
    def standard_error(self) -> float:
        """Of the mean: over draws sd / sqrt(draws); over test images the binomial sqrt(p (1 - p) / images)."""
        if self.over == "draws":
            return standard_error(np.array(self.values))
        return float(np.sqrt(self.mean * (1 - self.mean) / self.correct.shape[1]))


@dataclass(frozen=True)
class Difference:
    """How much better a second encoder is under one protocol.

    Attributes:
        name: Protocol.
        mean: Accuracy after minus accuracy before.
        standard_error: Of the mean, over the paired differences.
        over: What the pairs are: draws, or test images.
    """

    name: str
    mean: float
    standard_error: float
    over: ErrorSource


def standard_error(values: Float[np.ndarray, " n"]) -> float:
    """Return the standard error of the mean: sd (n - 1 in the denominator) / sqrt(n)."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(after: Measurement, before: Measurement) -> Difference:
    """Subtract two measurements draw by draw, or image by image when there is one draw.

    Pairs remove what both encoders share (an easy draw, a hard image) from the error of the difference.

    Args:
        after: The encoder in question.
        before: What it is compared to: same protocol, same draws, same test images in the same order.

    Raises:
        UsageError: If the two were not measured under the same protocol on as many draws and images.
    """
    require(
        (after.name, after.correct.shape) == (before.name, before.correct.shape),
        "after",
        f"must be measured like `before` ({before.name}, {before.correct.shape} draws and images)",
        f"{after.name}, {after.correct.shape}",
        "Evaluate both encoders with the same arguments.",
    )
    if after.over == "draws":
        pairs = np.array(after.values) - np.array(before.values)
    else:
        pairs = after.correct[0].astype(float) - before.correct[0].astype(float)
    return Difference(after.name, float(pairs.mean()), standard_error(pairs), after.over)
