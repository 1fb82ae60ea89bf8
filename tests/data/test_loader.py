import pytest
import torch
from data.deadly_source import DeniedSource
from data.image_files import encoded, map_source
from datasets import Dataset, Features, Image

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.loader import ViewLoader, worker_options
from e2mc_hf.data.retrying import RemoteFileError
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError

TRANSFORM = ViewTransform(ViewArguments(), ImageSettings(size=8))


@pytest.fixture(scope="module")
def dataset():
    return ViewDataset(load_images(DataArguments(max_samples=14), "train"), TRANSFORM, seed=0)


def loader(dataset, batch_size=4, rank=0, world_size=1, **options):
    return ViewLoader(dataset, batch_size, rank=rank, world_size=world_size, seed=0, **options)


def epoch_of(batches, epoch):
    """The epoch's batches as the trainer gets them."""
    batches.set_epoch(epoch)
    return [torch.stack(batch["views"]) for batch in batches]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_batches_hold_every_view(dataset):
    batches = epoch_of(loader(dataset), 0)
    assert [batch.shape for batch in batches] == [(2, 4, 3, 8, 8)] * len(loader(dataset)) == [(2, 4, 3, 8, 8)] * 3


def test_two_processes_see_the_global_batches_of_one(dataset):
    alone = epoch_of(loader(dataset), 1)
    ranks = [epoch_of(loader(dataset, 2, rank=rank, world_size=2), 1) for rank in (0, 1)]
    assert same(alone, [torch.cat(halves, dim=1) for halves in zip(*ranks, strict=True)])


def test_every_epoch_is_drawn_anew_and_can_be_drawn_again(dataset):
    batches = loader(dataset)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    assert not same(first, second)
    assert same(first, epoch_of(batches, 0))


def test_workers_change_no_value_in_any_epoch(dataset):
    here, there = loader(dataset), loader(dataset, num_workers=2)
    for epoch in (0, 1):
        assert same(epoch_of(here, epoch), epoch_of(there, epoch))
    there.skip(2)
    assert same(epoch_of(here, 2)[2:], epoch_of(there, 2))
    for batches in (here, there):
        batches.set_epoch(3)
        expected = [[row.sample_id for row in rows] for rows in batches.order.batches(3, 0)]
        assert [batches.sample_ids for _ in batches] == expected


def test_a_run_resumed_within_an_epoch_sees_the_rest_of_it_and_then_whole_epochs(dataset):
    resumed, whole = loader(dataset), loader(dataset)
    resumed.skip(1)
    assert same(epoch_of(resumed, 5), epoch_of(whole, 5)[1:])
    assert same(epoch_of(resumed, 6), epoch_of(whole, 6))
    assert len(resumed) == len(whole)


def test_views_are_normalized_floats_on_the_device_of_the_loader(dataset):
    (view, _) = next(iter(loader(dataset, device="meta")))["views"]
    assert view.device.type == "meta"
    (view, _) = next(iter(loader(dataset)))["views"]
    assert view.dtype == torch.float32
    assert view.min() < 0 < view.max()


def test_loading_leaves_the_global_random_state_alone(dataset):
    before = torch.get_rng_state()
    epoch_of(loader(dataset), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_gives_the_same_one_line_from_here_and_from_a_worker(num_workers):
    rows = Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}]}, features=Features({"image": Image()}))
    broken = ViewDataset(ImageSource(rows, "image", None, "tiny", None), TRANSFORM, seed=0)
    with pytest.raises(UsageError, match=r"^`dataset` must hold .* image 0 of 'tiny' .*Repair the dataset\.$"):
        epoch_of(loader(broken, 1, num_workers=num_workers), 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_keeps_its_type_and_its_line_from_here_and_from_a_worker(num_workers):
    rows = map_source(encoded(4)).dataset
    denied = ViewDataset(DeniedSource(rows, "image", None, "tiny", None), TRANSFORM, seed=0)
    with pytest.raises(RemoteFileError, match=r"^`dataset` is not for you \(403\)\. Ask for it\.$"):
        epoch_of(loader(denied, num_workers=num_workers), 0)


def test_workers_never_fork_the_training_process():
    assert worker_options(0) == {"num_workers": 0}
    assert worker_options(1)["multiprocessing_context"].get_start_method() in ("forkserver", "spawn")
