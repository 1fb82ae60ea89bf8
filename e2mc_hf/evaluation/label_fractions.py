"""A share of the labels, drawn class by class."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from e2mc_hf.arguments import require


def stratified_draw(
    labels: Int64[np.ndarray, " N"], fraction: float, *, seed: int | Sequence[int]
) -> Int64[np.ndarray, " M"]:
    """Draw round(fraction * count) images of each class, and never fewer than one.

    The draw is a function of labels, fraction and seed alone; with one seed, a smaller share lies within a larger one.

    Args:
        labels: Class of each image.
        fraction: Share of the labels to keep, in (0, 1].
        seed: Seed, or several numbers that make one.

    Returns:
        Indices of the images drawn, ascending.

    Raises:
        UsageError: If `fraction` lies outside (0, 1].
    """
    require(0 < fraction <= 1, "fraction", "must lie in (0, 1]", fraction, "1.0 keeps every label.")
    generator = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        drawn.append(shuffled[: max(1, round(fraction * len(shuffled)))])
    return np.sort(np.concatenate(drawn))
