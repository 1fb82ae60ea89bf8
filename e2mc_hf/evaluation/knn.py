"""Weighted nearest neighbors on the unit sphere: no parameter is fitted."""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from e2mc_hf.arguments import require
from e2mc_hf.evaluation.features import Features

CHUNK_SIZE = 1024  # test rows at a time: bounds the (rows, train) similarities in memory


def knn_predict(
    train: Features,
    test_x: Float32[np.ndarray, "M F"],
    *,
    num_neighbors: int = 20,
    temperature: float = 0.07,
) -> Int64[np.ndarray, " M"]:
    """Predict the class that gets most votes among the nearest training images.

    A neighbor at cosine similarity s votes with exp(s / temperature). Features are divided by their norm and
    not centered, so that a rescaling of all features changes nothing.

    Args:
        train: Training images.
        test_x: Features of the test images.
        num_neighbors: Neighbors that vote.
        temperature: Similarity at which a vote falls by a factor e.

    Returns:
        Predicted class of each test image.

    Raises:
        UsageError: If there are fewer training images than neighbors.

    Reference:
        Wu et al., Unsupervised feature learning via non-parametric instance discrimination, 2018,
        https://arxiv.org/abs/1805.01978, Sec. 3.4. Differs in: k = 20, as in DINO (arXiv 2104.14294), not 200.
    """
    require(
        1 <= num_neighbors <= len(train.x),
        "num_neighbors",
        f"must lie between 1 and the {len(train.x)} training images",
        num_neighbors,
        "Pass a smaller --num_neighbors or more training images.",
    )
    require(temperature > 0, "temperature", "must be positive", temperature, "The usual one is 0.07.")
    classes, labels = np.unique(train.y, return_inverse=True)
    train_rows, test_rows = _unit_rows(train.x), _unit_rows(test_x)
    chunks = [test_rows[start : start + CHUNK_SIZE] for start in range(0, len(test_rows), CHUNK_SIZE)]
    winners = [_votes(chunk @ train_rows.T, labels, num_neighbors, temperature).argmax(axis=1) for chunk in chunks]
    predictions: np.ndarray = classes[np.concatenate(winners)]
    return predictions


def _unit_rows(x: Float32[np.ndarray, "N F"]) -> Float32[np.ndarray, "N F"]:
    """Divide each row by its norm; a row of zeros stays."""
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return (x / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def _votes(
    similarity: Float32[np.ndarray, "M N"], labels: Int64[np.ndarray, " N"], num_neighbors: int, temperature: float
) -> Float64[np.ndarray, "M K"]:
    """Add up the votes of the nearest neighbors for each of the K classes."""
    nearest = np.argpartition(-similarity, num_neighbors - 1, axis=1)[:, :num_neighbors]
    chosen = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
    weights = np.exp((chosen - chosen.max(axis=1, keepdims=True)) / temperature)  # the common factor cancels
    votes = np.zeros((len(similarity), int(labels.max()) + 1))
    np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
    return votes
