import math

import numpy as np
import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation.statistics import Measurement, paired_difference, standard_error


def single(correct, name="knn k=20"):
    correct = np.array([correct], dtype=bool)
    return Measurement(name, (float(correct.mean()),), correct)


def drawn(values):
    return Measurement("linear probe 1%", tuple(values), np.zeros((len(values), 4), dtype=bool))


def test_the_standard_error_of_1_2_3_4_is_sqrt_5_over_12():
    assert standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 12))


def test_several_draws_give_mean_and_standard_error_over_draws():
    measurement = drawn([0.5, 0.6, 0.7])
    assert (measurement.over, measurement.num_draws) == ("draws", 3)
    assert measurement.mean == pytest.approx(0.6)
    assert measurement.standard_error == pytest.approx(0.1 / math.sqrt(3))


def test_a_single_value_has_the_binomial_standard_error_over_test_images():
    measurement = single([1, 1, 1, 0])
    assert (measurement.over, measurement.mean) == ("test images", 0.75)
    assert measurement.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_one_draw_alone_carries_the_error_over_test_images():
    measurement = drawn([0.5])
    assert (measurement.over, measurement.standard_error) == ("test images", 0.25)


def test_differences_over_draws_are_taken_draw_by_draw():
    difference = paired_difference(drawn([0.52, 0.63, 0.72]), drawn([0.50, 0.60, 0.70]))
    assert difference.mean == pytest.approx((0.02 + 0.03 + 0.02) / 3)
    assert difference.standard_error == pytest.approx(0.01 / 3)  # sd of (2, 3, 2) is 1 / sqrt(3)
    assert difference.over == "draws"


def test_differences_of_single_values_are_taken_image_by_image():
    difference = paired_difference(single([1, 1, 1, 0, 1]), single([1, 0, 0, 1, 1]))
    assert difference.mean == pytest.approx(0.2)
    assert difference.standard_error == pytest.approx(math.sqrt((3 - 5 * 0.04) / 4 / 5))
    assert difference.over == "test images"


def test_pairing_makes_the_error_smaller_than_that_of_two_independent_sets():
    generator = np.random.default_rng(0)
    before = generator.random(2000) < 0.7
    after = np.where(generator.random(2000) < 0.05, True, before)
    difference = paired_difference(single(after), single(before))
    assert 0 < difference.standard_error < 0.5 * math.hypot(single(after).standard_error, single(before).standard_error)


def test_an_encoder_does_not_differ_from_itself():
    for measurement in (single([1, 0, 1]), drawn([0.2, 0.9])):
        difference = paired_difference(measurement, measurement)
        assert (difference.mean, difference.standard_error) == (0, 0)


@pytest.mark.parametrize("other", [single([1, 0, 1]), single([1, 0], "knn k=5"), drawn([0.1, 0.2])])
def test_measurements_of_unlike_protocols_or_images_are_refused(other):
    with pytest.raises(UsageError, match="measured like `before`"):
        paired_difference(other, single([1, 0]))
