from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from e2mc_hf.arguments import EvaluationArguments
from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation.protocol import compare, evaluate_encoder

ARGUMENTS = EvaluationArguments(label_fractions=[0.05, 1.0], num_draws=3, num_neighbors=5)


@pytest.fixture(scope="module")
def pixels(digit_images):
    return evaluate_encoder(nn.Flatten(), *digit_images, ARGUMENTS, name="pixels")


@pytest.fixture(scope="module")
def blurred(digit_images):
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    return evaluate_encoder(encoder, *digit_images, ARGUMENTS, name="blurred")


def test_one_measurement_is_made_for_each_protocol_in_order(pixels):
    assert [measurement.name for measurement in pixels.measurements] == [
        "knn k=5",
        "linear probe 5%",
        "linear probe 100%",
    ]
    assert [measurement.num_draws for measurement in pixels.measurements] == [1, 3, 1]
    assert (pixels.num_features, pixels.num_train_images, pixels.num_test_images) == (192, 1000, 797)


def test_digits_are_read_from_raw_pixels(pixels):
    neighbors, few, full = pixels.measurements
    assert neighbors.mean > 0.95
    assert full.mean > 0.9
    assert 0.6 < few.mean < full.mean


def test_values_are_the_share_of_images_marked_correct(pixels):
    for measurement in pixels.measurements:
        np.testing.assert_allclose(measurement.values, measurement.correct.mean(axis=1), rtol=1e-12)


def test_the_same_arguments_give_the_same_numbers_and_another_seed_other_draws(pixels, digit_images):
    again = evaluate_encoder(nn.Flatten(), *digit_images, ARGUMENTS)
    other = evaluate_encoder(nn.Flatten(), *digit_images, replace(ARGUMENTS, seed=1))
    values = [[measurement.values for measurement in result.measurements] for result in (pixels, again, other)]
    assert values[0] == values[1]
    assert values[2][1] != values[0][1]
    assert values[2][0] == values[0][0]


def test_an_encoder_that_only_rescales_differs_by_nothing(pixels, digit_images):
    class Quadruple(nn.Module):
        def forward(self, images):
            return 4 * images.flatten(1)

    rescaled = evaluate_encoder(Quadruple(), *digit_images, ARGUMENTS, name="rescaled")
    for row in compare([pixels, rescaled]):
        assert (row.difference.mean, row.difference.standard_error) == (0, 0)


def test_every_later_encoder_is_compared_to_the_first(pixels, blurred):
    rows = compare([pixels, blurred])
    assert [(row.encoder, row.baseline) for row in rows] == [("blurred", "pixels")] * 3
    for row, before, after in zip(rows, pixels.measurements, blurred.measurements, strict=True):
        assert row.difference.mean == pytest.approx(after.mean - before.mean)
        assert row.difference.mean < -3 * row.difference.standard_error < 0
    assert compare([pixels]) == []


def test_results_on_other_images_do_not_compare(pixels, digit_images):
    train, test = digit_images
    reordered = Subset(test, torch.arange(796, -1, -1).tolist())
    other = evaluate_encoder(nn.Flatten(), train, reordered, ARGUMENTS, name="other")
    with pytest.raises(UsageError, match="images and protocols of the first"):
        compare([pixels, other])


def test_two_encoders_of_one_name_do_not_compare(pixels):
    with pytest.raises(UsageError, match="a name each"):
        compare([pixels, pixels])


def test_test_images_of_classes_never_trained_on_are_refused(digit_images):
    train, test = digit_images
    few = Subset(train, [index for index in range(1000) if train.labels[index] not in (4, 8)])
    with pytest.raises(UsageError, match=r"2 others, \[4, 8\] first"):
        evaluate_encoder(nn.Flatten(), few, test, ARGUMENTS)
