import pytest
import torch

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import EvaluationDataset, ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.sources import ImageSource, load_images
from e2mc_hf.data.views import ViewTransform, evaluation_transform
from e2mc_hf.errors import UsageError

SETTINGS = ImageSettings(size=8)


@pytest.fixture(scope="module")
def source():
    return load_images(DataArguments(max_samples=6), "train")


def test_the_epoch_travels_with_the_index(source):
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    assert len(dataset) == 6
    assert not torch.equal(dataset[0, 3][0], dataset[1, 3][0])
    assert torch.equal(dataset[1, 3][0], dataset[1, 3][0])


def test_an_index_alone_means_epoch_0(source):
    dataset = ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=0)
    assert torch.equal(dataset[2][1], dataset[0, 2][1])


def test_the_seed_changes_the_views(source):
    first, second = (ViewDataset(source, ViewTransform(ViewArguments(), SETTINGS), seed=seed) for seed in (0, 1))
    assert not torch.equal(first[0][0], second[0][0])


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
