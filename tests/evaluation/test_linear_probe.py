import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation import linear_probe
from e2mc_hf.evaluation.features import Features
from e2mc_hf.evaluation.label_fractions import stratified_draw
from e2mc_hf.evaluation.linear_probe import STRENGTH_WITHOUT_HELD_OUT, STRENGTHS, fit_and_predict


def subset(features, rows):
    return Features(features.x[rows], features.y[rows])


def test_raw_digits_with_all_labels_are_read_above_90_percent(digit_features):
    train, test = digit_features
    probe = fit_and_predict(train, test.x)
    assert (probe.predictions == test.y).mean() > 0.9
    assert probe.converged
    assert probe.strength in STRENGTHS


def test_predictions_minimize_the_regularized_cross_entropy(digit_features):
    train, test = subset(digit_features[0], slice(0, 200)), digit_features[1]
    probe = fit_and_predict(train, test.x)
    center = train.x.mean(axis=0, dtype=float)
    scale = np.sqrt(((train.x - center) ** 2).mean())
    x, one_hot = (train.x - center) / scale, np.eye(10)[train.y]

    def objective(flat):
        weight, bias = flat[:640].reshape(64, 10), flat[640:]
        logits = x @ weight + bias
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        slope = np.exp(log_p) - one_hot
        loss = -probe.strength * (log_p * one_hot).sum() + (weight**2).sum() / 2
        gradient = np.concatenate([(probe.strength * x.T @ slope + weight).ravel(), probe.strength * slope.sum(axis=0)])
        return loss, gradient

    best = minimize(objective, np.zeros(650), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-8})
    logits = (test.x - center) / scale @ best.x[:640].reshape(64, 10) + best.x[640:]
    top_two = np.sort(logits, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > 0.05
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(probe.predictions[clear], logits.argmax(axis=1)[clear])


@pytest.mark.parametrize("scale", [1e-6, 0.37, 2.0**20])
def test_rescaling_all_features_changes_neither_predictions_nor_strength(digit_features, scale):
    train, test = digit_features
    train, factor = subset(train, slice(0, 150)), np.float32(scale)
    plain, rescaled = (
        fit_and_predict(train, test.x),
        fit_and_predict(Features(train.x * factor, train.y), test.x * factor),
    )
    assert rescaled.strength == plain.strength
    np.testing.assert_array_equal(rescaled.predictions, plain.predictions)


def test_a_shift_of_all_features_changes_nothing(digit_features):
    train, test = subset(digit_features[0], slice(0, 150)), digit_features[1]
    plain, shifted = fit_and_predict(train, test.x), fit_and_predict(Features(train.x + 64, train.y), test.x + 64)
    assert shifted.strength == plain.strength
    np.testing.assert_array_equal(shifted.predictions, plain.predictions)


def test_the_strength_is_small_for_features_that_say_little_and_large_for_those_that_say_all():
    generator = np.random.default_rng(0)
    y = np.arange(300) % 3
    noise = generator.normal(size=(300, 20)).astype(np.float32)
    signal = np.eye(20, dtype=np.float32)[y] + 0.01 * noise
    assert fit_and_predict(Features(noise, y), noise).strength <= 1e-2
    assert fit_and_predict(Features(signal, y), signal).strength >= 1e1


def test_test_features_take_no_part_in_the_fit(digit_features):
    train, test = subset(digit_features[0], slice(0, 150)), digit_features[1]
    together, alone = fit_and_predict(train, test.x), fit_and_predict(train, test.x[:5])
    assert together.strength == alone.strength
    np.testing.assert_array_equal(together.predictions[:5], alone.predictions)


def test_one_label_a_class_takes_the_fixed_strength(digit_features):
    train, test = digit_features
    single = subset(train, stratified_draw(train.y, 1e-6, seed=0))
    assert len(single.y) == 10
    probe = fit_and_predict(single, test.x)
    assert probe.strength == STRENGTH_WITHOUT_HELD_OUT
    assert (probe.predictions == test.y).mean() > 0.4


def test_a_class_with_one_label_is_never_held_out_and_others_keep_one():
    y = np.repeat([0, 1, 2, 3], [1, 2, 10, 100])
    held_out = linear_probe._held_out(y, seed=0)
    assert np.bincount(y[held_out], minlength=4).tolist() == [0, 1, 2, 20]


def test_two_classes_are_enough(digit_features):
    train, test = (subset(features, features.y < 2) for features in digit_features)
    assert (fit_and_predict(train, test.x).predictions == test.y).mean() > 0.97


def test_collapsed_features_give_one_class_and_no_warning():
    x = np.full((40, 8), 0.1, dtype=np.float32)
    x[::3] += np.float32(1e-8)
    probe = fit_and_predict(Features(x, np.arange(40) % 4), x)
    assert len(set(probe.predictions.tolist())) == 1


def test_a_fit_cut_short_is_recorded_and_does_not_warn(digit_features, monkeypatch):
    train, test = digit_features
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not fit_and_predict(subset(train, slice(0, 150)), test.x).converged
    assert caught == []


def test_labels_of_one_class_are_refused(digit_features):
    train, test = digit_features
    with pytest.raises(UsageError, match="at least 2 classes, got 1"):
        fit_and_predict(subset(train, train.y == 3), test.x)
