"""The evaluation of one encoder: features once, then nearest neighbors and linear probes on shares of the labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from e2mc_hf.arguments import EvaluationArguments, require
from e2mc_hf.evaluation.features import Features, extract_features
from e2mc_hf.evaluation.knn import knn_predict
from e2mc_hf.evaluation.label_fractions import stratified_draw
from e2mc_hf.evaluation.linear_probe import fit_and_predict
from e2mc_hf.evaluation.metrics import accuracy
from e2mc_hf.evaluation.statistics import Difference, Measurement, paired_difference


@dataclass(frozen=True, eq=False)
class EncoderResult:
    """What was measured on one encoder.

    Attributes:
        name: The encoder, as the results shall call it.
        num_features: F, the length of a feature vector.
        num_train_images: Images the probes were fitted on.
        num_test_images: Images they were tested on.
        labels_sha256: Digest of both label lists: results compare only on the same images in the same order.
        measurements: One a protocol.
    """

    name: str
    num_features: int
    num_train_images: int
    num_test_images: int
    labels_sha256: str
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class Comparison:
    """The difference of one encoder to an earlier one of a list, under one protocol."""

    encoder: str
    baseline: str
    difference: Difference


def evaluate_encoder(
    encoder: nn.Module,
    train_dataset: Dataset[Any],
    test_dataset: Dataset[Any],
    arguments: EvaluationArguments,
    *,
    name: str = "encoder",
    device: torch.device | str | None = None,
) -> EncoderResult:
    """Measure a frozen encoder: k nearest neighbors, and a linear probe for each share of the labels.

    The draws depend on `arguments.seed`, the number of the draw and the labels, so every encoder gets the same.

    Args:
        encoder: Maps (B, 3, H, W) images to (B, F) features.
        train_dataset: (image, class) pairs the probes are fitted on.
        test_dataset: Pairs they are tested on; they take no part in any choice.
        arguments: Shares, draws, neighbors, batches and seed.
        name: The encoder, as the results shall call it.
        device: Where the encoder runs; where it is when not given.

    Raises:
        UsageError: If the features or the labels do not allow a protocol.
    """
    train, test = (
        extract_features(
            encoder,
            dataset,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            device=device,
            description=f"{name}, {part}",
        )
        for part, dataset in (("train", train_dataset), ("test", test_dataset))
    )
    _require_matching_labels(train, test)
    fractions = dict.fromkeys(arguments.label_fractions)
    return EncoderResult(
        name=name,
        num_features=train.x.shape[1],
        num_train_images=len(train.y),
        num_test_images=len(test.y),
        labels_sha256=hashlib.sha256(train.y.tobytes() + b"/" + test.y.tobytes()).hexdigest(),
        measurements=(
            measure_neighbors(train, test, num_neighbors=arguments.num_neighbors),
            *(measure_probe(train, test, share, arguments.num_draws, arguments.seed) for share in fractions),
        ),
    )


def measure_neighbors(train: Features, test: Features, *, num_neighbors: int) -> Measurement:
    """Measure the nearest-neighbor classifier on all training labels."""
    predictions = knn_predict(train, test.x, num_neighbors=num_neighbors)
    return Measurement(
        name=f"knn k={num_neighbors}",
        values=(accuracy(predictions, test.y),),
        correct=(predictions == test.y)[None],
        num_labels=len(train.y),
    )


def measure_probe(train: Features, test: Features, fraction: float, num_draws: int, seed: int) -> Measurement:
    """Measure the linear probe on one share of the labels: several draws below 1, a single fit on all."""
    probes = []
    for draw in range(num_draws if fraction < 1 else 1):
        rows = stratified_draw(train.y, fraction, seed=(seed, draw))
        probes.append(fit_and_predict(Features(train.x[rows], train.y[rows]), test.x, seed=(seed, draw)))
    return Measurement(
        name=f"linear probe {100 * fraction:g}%",
        values=tuple(accuracy(probe.predictions, test.y) for probe in probes),
        correct=np.stack([probe.predictions == test.y for probe in probes]),
        strengths=tuple(probe.strength for probe in probes),
        converged=tuple(probe.converged for probe in probes),
        num_labels=len(rows),
    )


def compare(results: Sequence[EncoderResult]) -> list[Comparison]:
    """Subtract every encoder from every later one, protocol by protocol.

    Args:
        results: Encoders evaluated with the same arguments on the same images: before, control, after, say.

    Raises:
        UsageError: If two encoders share a name, or were not evaluated alike.
    """
    names = [result.name for result in results]
    require(len(set(names)) == len(names), "results", "must have a name each", names, "Name the encoders apart.")
    return [
        Comparison(after.name, before.name, difference)
        for before, after in combinations(results, 2)
        for difference in _differences(after, before)
    ]


def _differences(after: EncoderResult, before: EncoderResult) -> list[Difference]:
    require(
        after.labels_sha256 == before.labels_sha256 and len(after.measurements) == len(before.measurements),
        "results",
        f"must come from the images and protocols of the first, `{before.name}`",
        after.name,
        "Evaluate both encoders with the same data and arguments.",
    )
    return [paired_difference(*pair) for pair in zip(after.measurements, before.measurements, strict=True)]


def _require_matching_labels(train: Features, test: Features) -> None:
    unknown = np.setdiff1d(test.y, train.y).tolist()
    require(
        not unknown,
        "test_dataset",
        "must hold only classes of the training images",
        f"{len(unknown)} others, {unknown[:5]} first",
        "Check that both splits number their classes alike, or use more training images.",
    )
    require(len(test.y) >= 2, "test_dataset", "must hold at least 2 images", len(test.y), "Use another split.")
