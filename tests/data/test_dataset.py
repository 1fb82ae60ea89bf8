import pytest
import torch
from data.image_files import BROKEN, encoded, map_source, png, stream_source

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import EvaluationDataset, ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.rows import Row
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.unreadable import Unreadable
from e2mc_hf.data.views import ViewTransform, evaluation_transform
from e2mc_hf.errors import UsageError

SETTINGS = ImageSettings(size=8)


@pytest.fixture(scope="module")
def source():
    return load_images(DataArguments(max_samples=6), "train")


def pixels(dataset, key):
    return dataset[key].views[1].pixels


def test_the_epoch_travels_with_the_row(source):
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    assert len(dataset) == 6
    assert not torch.equal(pixels(dataset, Row(0, 3)), pixels(dataset, Row(1, 3)))
    assert torch.equal(pixels(dataset, Row(1, 3)), pixels(dataset, Row(1, 3)))


def test_an_index_alone_means_epoch_0(source):
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    assert torch.equal(pixels(dataset, 2), pixels(dataset, Row(0, 2)))


def test_the_seed_changes_the_views(source):
    first, second = (ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=seed) for seed in (0, 1))
    assert not torch.equal(pixels(first, 0), pixels(second, 0))


def test_a_row_that_brings_its_image_gives_the_views_of_the_same_image_map_style(source):
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    assert torch.equal(pixels(dataset, Row(1, 4, source.encoded(4))), pixels(dataset, Row(1, 4)))


def test_an_unreadable_image_is_replaced_by_the_views_of_another_and_named():
    dataset = ViewDataset(map_source(encoded(9, {4})), ViewTransform(ViewArguments(), SETTINGS), seed=0)
    sample = dataset[Row(2, 4)]
    assert sample.unreadable == Unreadable(4, "not an image")
    others = [dataset[Row(2, index)].views[0].pixels for index in range(9) if index != 4]
    assert sum(torch.equal(sample.views[0].pixels, other) for other in others) == 1


def test_an_unreadable_row_of_a_stream_takes_its_spares_from_its_own_place_on(tmp_path):
    source = stream_source(tmp_path, encoded(9), [9])
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    spares = tuple(Row(0, index, png(index)) for index in (5, 6, 7))
    sample = dataset[Row(0, 4, BROKEN, spares)]  # 4 % 3 = 1: the second spare comes first
    assert torch.equal(sample.views[0].pixels, dataset[Row(0, 6, png(6))].views[0].pixels)
    broken_too = (spares[0], Row(0, 6, BROKEN), spares[2])
    sample = dataset[Row(0, 4, BROKEN, broken_too)]
    assert torch.equal(sample.views[0].pixels, dataset[Row(0, 7, png(7))].views[0].pixels)
    assert sample.unreadable == Unreadable(4, "not an image")


@pytest.mark.parametrize("broken", [{0}, {0, 1, 2, 3}])
def test_the_first_rows_of_a_stream_have_stand_ins(tmp_path, broken):
    source = stream_source(tmp_path, encoded(9, broken), [2, 7])
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    (row,) = dataset.first_rows(1)
    assert dataset[row].unreadable == Unreadable(0, "not an image")
    assert [row.sample_id for row in dataset.first_rows(20)] == list(range(9))
    assert [dataset[row].unreadable is None for row in dataset.first_rows(6)] == [n not in broken for n in range(6)]


def test_evaluation_gives_the_prepared_image_and_its_label(source):
    dataset = EvaluationDataset(source, evaluation_transform(SETTINGS))
    tensor, label = dataset[4]
    assert len(dataset) == 6
    assert tensor.shape == (3, 8, 8)
    assert label == source.labels()[4]


def test_evaluation_without_labels_is_refused_before_anything_is_read(source):
    unlabeled = ImageSource(source.dataset, "image", None, "digits", None)
    with pytest.raises(UsageError, match="`label_column`"):
        EvaluationDataset(unlabeled, evaluation_transform(SETTINGS))
