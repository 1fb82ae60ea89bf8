import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation import knn
from e2mc_hf.evaluation.features import Features
from e2mc_hf.evaluation.knn import knn_predict


@pytest.mark.parametrize("num_neighbors", [1, 20, 1000])
def test_predictions_are_those_of_scikit_learn_with_the_same_weights(digit_features, num_neighbors):
    train, test = digit_features
    reference = KNeighborsClassifier(
        num_neighbors, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = reference.fit(train.x.astype(float), train.y).predict(test.x.astype(float))
    np.testing.assert_array_equal(knn_predict(train, test.x, num_neighbors=num_neighbors), expected)


def test_votes_are_the_loop_over_neighbors_written_out():
    generator = np.random.default_rng(0)
    train = Features(generator.normal(size=(60, 4)).astype(np.float32), generator.choice([2, 7, 11], 60))
    test_x = generator.normal(size=(25, 4)).astype(np.float32)
    for row, prediction in zip(test_x, knn_predict(train, test_x, num_neighbors=9, temperature=0.5), strict=True):
        cosine = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in train.x]
        votes = dict.fromkeys((2, 7, 11), 0.0)
        for index in sorted(range(60), key=lambda index: -cosine[index])[:9]:
            votes[int(train.y[index])] += np.exp(cosine[index] / 0.5)
        assert prediction == max(votes, key=votes.get)


def test_a_close_neighbor_outvotes_two_distant_ones_only_at_low_temperature():
    train = Features(np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], dtype=np.float32), np.array([4, 1, 1]))
    test_x = np.array([[1, 0]], dtype=np.float32)
    assert knn_predict(train, test_x, num_neighbors=3, temperature=0.07).tolist() == [4]  # e^(0.4 / 0.07) > 2
    assert knn_predict(train, test_x, num_neighbors=3, temperature=1.0).tolist() == [1]  # e^0.4 < 2


def test_chunks_of_test_rows_change_nothing(digit_features, monkeypatch):
    train, test = digit_features
    whole = knn_predict(train, test.x)
    monkeypatch.setattr(knn, "CHUNK_SIZE", 100)
    np.testing.assert_array_equal(knn_predict(train, test.x), whole)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_rescaling_all_features_changes_nothing(digit_features, scale):
    train, test = digit_features
    factor = np.float32(scale)
    rescaled = knn_predict(Features(train.x * factor, train.y), test.x * factor)
    np.testing.assert_array_equal(rescaled, knn_predict(train, test.x))


def test_a_tiny_temperature_does_not_overflow(digit_features):
    train, test = digit_features
    nearest = knn_predict(train, test.x, num_neighbors=1)
    np.testing.assert_array_equal(knn_predict(train, test.x, num_neighbors=5, temperature=1e-7), nearest)


def test_features_of_zeros_are_classified_without_warning():
    train = Features(np.zeros((3, 2), dtype=np.float32), np.array([6, 6, 8]))
    assert knn_predict(train, np.zeros((1, 2), dtype=np.float32), num_neighbors=3).tolist() == [6]


def test_more_neighbors_than_training_images_are_refused(digit_features):
    train, test = digit_features
    with pytest.raises(UsageError, match="between 1 and the 1000 training images, got 1001"):
        knn_predict(train, test.x, num_neighbors=1001)
