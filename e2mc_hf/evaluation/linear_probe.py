"""Multinomial logistic regression on frozen features, its strength chosen on held-out training labels."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from e2mc_hf.arguments import require
from e2mc_hf.evaluation.features import Features
from e2mc_hf.evaluation.label_fractions import stratified_draw

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (step / 2) for step in range(-8, 5))  # 1e-4 ... 1e2, two a decade
STRENGTH_WITHOUT_HELD_OUT = 1.0
HELD_OUT_SHARE = 0.2
MAX_ITERATIONS = 5000
TOLERANCE = 1e-6  # at the usual 1e-4 one image in a hundred is still not where the optimum puts it
PATIENCE = 2  # steps of the grid without a better held-out loss after which the search ends


@dataclass(frozen=True, eq=False)
class ProbePrediction:
    """What a fitted probe says of the test images.

    Attributes:
        predictions: Predicted class of each test image.
        strength: The C that was chosen: inverse of the weight of the squared norm, after scaling the features.
        converged: Whether the final fit met its tolerance.
    """

    predictions: Int64[np.ndarray, " M"]
    strength: float
    converged: bool


def fit_and_predict(
    train: Features, test_x: Float32[np.ndarray, "M F"], *, seed: int | Sequence[int] = 0
) -> ProbePrediction:
    """Fit a linear classifier by L-BFGS and predict the test images.

    Features are centered and divided by one scalar, so that neither a shift nor a rescaling of all of them changes
    the result. The strength is the one of `STRENGTHS` with the lowest loss on a held-out fifth of each class; the
    probe is then fitted from zero on all labels. A class with one label is never held out; when that leaves
    nothing to hold out, the strength is `STRENGTH_WITHOUT_HELD_OUT`.

    Args:
        train: Labeled images; the test images take no part in any choice.
        test_x: Features of the test images.
        seed: Seed of the held-out part.

    Raises:
        UsageError: If the labels are all of one class.
    """
    from threadpoolctl import threadpool_limits

    num_classes = len(np.unique(train.y))
    require(num_classes >= 2, "train", "must hold at least 2 classes", num_classes, "Use another split.")
    train_x, scaled_test_x = _standardize(train.x, test_x)
    # One thread: products this narrow gain little from more, and no result depends on the number of cores.
    with threadpool_limits(1, user_api="blas"):
        strength = _choose_strength(train_x, train.y, seed)
        probe = _new_probe()
        converged = _fit(probe, train_x, train.y, strength)
    return ProbePrediction(probe.predict(scaled_test_x), strength, converged)


def _standardize(
    train_x: Float32[np.ndarray, "N F"], test_x: Float32[np.ndarray, "M F"]
) -> tuple[Float64[np.ndarray, "N F"], Float64[np.ndarray, "M F"]]:
    """Subtract the training mean of each coordinate and divide everything by one root-mean-square.

    Coordinates keep their relative scale: it is part of what the encoder has learned.
    """
    mean = train_x.mean(axis=0, dtype=np.float64)
    centered = train_x - mean
    scale = float(np.sqrt(np.mean(centered**2)))
    largest = float(np.abs(train_x).max())
    if scale <= np.finfo(np.float32).eps * largest:  # collapsed: only rounding noise is left, not to be blown up
        scale = largest if largest > 0 else 1.0
    return centered / scale, (test_x - mean) / scale


def _choose_strength(x: Float64[np.ndarray, "N F"], y: Int64[np.ndarray, " N"], seed: int | Sequence[int]) -> float:
    """Return the strength with the lowest held-out loss.

    The loss rather than the accuracy: on a handful of held-out images accuracy ties and jumps. Each fit
    starts from the previous, weaker one; past the minimum the loss rises, and the slowest fits are spared.
    """
    from sklearn.metrics import log_loss

    held_out = _held_out(y, seed)
    if not held_out.any():
        return STRENGTH_WITHOUT_HELD_OUT
    probe = _new_probe()
    losses: list[float] = []
    for strength in STRENGTHS:
        _fit(probe, x[~held_out], y[~held_out], strength)
        losses.append(float(log_loss(y[held_out], probe.predict_proba(x[held_out]), labels=probe.classes_)))
        if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
            break
    return STRENGTHS[int(np.argmin(losses))]


def _held_out(y: Int64[np.ndarray, " N"], seed: int | Sequence[int]) -> Bool[np.ndarray, " N"]:
    """Mark a fifth of each class that has two labels or more; every class keeps one to fit on."""
    held_out = np.zeros(len(y), dtype=bool)
    classes, counts = np.unique(y, return_counts=True)
    divisible = np.flatnonzero(np.isin(y, classes[counts >= 2]))
    if len(divisible) > 0:
        held_out[divisible[stratified_draw(y[divisible], HELD_OUT_SHARE, seed=seed)]] = True
    return held_out


def _new_probe() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="lbfgs", max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)


def _fit(probe: Any, x: Float64[np.ndarray, "N F"], y: Int64[np.ndarray, " N"], strength: float) -> bool:
    """Fit from where the probe stands and tell whether it converged, in place of scikit-learn's warning."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.set_params(C=strength).fit(x, y)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn(warning.message, stacklevel=2)
    return len(others) == len(caught)
