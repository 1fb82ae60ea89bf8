import pytest
import torch

from e2mc_hf.data.collator import collate_views
from e2mc_hf.data.dataset import Sample
from e2mc_hf.data.unreadable import Unreadable
from e2mc_hf.data.views import View


def view(value: int, side: int = 8) -> View:
    return View(torch.full((3, side, side), value, dtype=torch.uint8), torch.tensor([float(value), 0.5]))


def test_each_view_and_its_parameters_are_stacked_over_the_samples():
    batch = collate_views([Sample([view(2 * sample + place) for place in range(2)]) for sample in range(4)])
    assert [(pixels.shape, pixels.dtype) for pixels in batch["views"]] == [((4, 3, 8, 8), torch.uint8)] * 2
    assert batch["views"][1][:, 0, 0, 0].tolist() == [1, 3, 5, 7]
    assert batch["photometry"][1].tolist() == [[1, 0.5], [3, 0.5], [5, 0.5], [7, 0.5]]


def test_views_may_differ_in_size():
    batch = collate_views([Sample([view(0), view(0, side=4)])] * 2)
    assert [pixels.shape for pixels in batch["views"]] == [(2, 3, 8, 8), (2, 3, 4, 4)]


def test_images_that_could_not_be_read_are_listed():
    missed = Unreadable(7, "truncated")
    batch = collate_views([Sample([view(0)]), Sample([view(1)], missed), Sample([view(2)])])
    assert batch["unreadable"] == [missed]


def test_samples_with_different_numbers_of_views_are_refused():
    with pytest.raises(ValueError, match="zip"):
        collate_views([Sample([view(0)]), Sample([view(0)] * 2)])
