import pytest
import torch

from e2mc_hf.data.collator import collate_views


def test_each_view_is_stacked_over_the_samples():
    samples = [[torch.full((3, 8, 8), float(2 * sample + view)) for view in range(2)] for sample in range(4)]
    views = collate_views(samples)["views"]
    assert [view.shape for view in views] == [(4, 3, 8, 8)] * 2
    assert views[1][:, 0, 0, 0].tolist() == [1.0, 3.0, 5.0, 7.0]


def test_views_may_differ_in_size():
    views = collate_views([[torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)]] * 2)["views"]
    assert [view.shape for view in views] == [(2, 3, 8, 8), (2, 3, 4, 4)]


def test_samples_with_different_numbers_of_views_are_refused():
    with pytest.raises(ValueError, match="zip"):
        collate_views([[torch.zeros(3, 4, 4)], [torch.zeros(3, 4, 4)] * 2])
