"""Metrics computed through `evaluate`, from the modules this package ships: no network is needed."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

METRICS_FOLDER = Path(__file__).resolve().parents[1] / "metrics"


def accuracy(predictions: Int64[np.ndarray, " N"], references: Int64[np.ndarray, " N"]) -> float:
    """Return the share of predictions that equal their reference, in [0, 1].

    Args:
        predictions: Predicted class of each image.
        references: True class of each image.
    """
    result = _load("top1_accuracy").compute(predictions=predictions, references=references)
    return float(result["top1_accuracy"])


@cache
def _load(name: str) -> Any:
    """Load a metric once a process; the import of `evaluate` alone takes seconds."""
    import evaluate

    # The path of the file, absolute: a bare name would be looked up in the working folder and on the Hub.
    return evaluate.load(str(METRICS_FOLDER / name / f"{name}.py"), keep_in_memory=True)
