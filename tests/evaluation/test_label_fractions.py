import numpy as np
import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation.label_fractions import stratified_draw

LABELS = np.repeat([3, 5, 9], [200, 41, 2])[np.random.default_rng(0).permutation(243)]


@pytest.mark.parametrize(("fraction", "counts"), [(0.01, [2, 1, 1]), (0.1, [20, 4, 1]), (0.5, [100, 20, 1])])
def test_each_class_gives_its_rounded_share_and_at_least_one(fraction, counts):
    drawn = stratified_draw(LABELS, fraction, seed=0)
    assert np.unique(LABELS[drawn], return_counts=True)[1].tolist() == counts
    assert len(set(drawn.tolist())) == len(drawn)


def test_all_labels_are_every_index_once():
    assert stratified_draw(LABELS, 1.0, seed=4).tolist() == list(range(243))


def test_the_seed_decides_the_draw():
    first, again, other = (stratified_draw(LABELS, 0.1, seed=seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert first.tolist() == again.tolist() != other.tolist()


def test_a_smaller_share_lies_within_a_larger_one_of_the_same_seed():
    small, large = (set(stratified_draw(LABELS, fraction, seed=7).tolist()) for fraction in (0.05, 0.3))
    assert small < large


def test_every_image_of_a_class_is_drawn_equally_often():
    drawn = np.concatenate([stratified_draw(LABELS, 0.1, seed=seed) for seed in range(2000)])
    counts = np.bincount(drawn, minlength=243)[LABELS == 3]
    assert abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1])
def test_a_share_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UsageError, match="fraction"):
        stratified_draw(LABELS, fraction, seed=0)
