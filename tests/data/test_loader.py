import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset, Features, Image

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.loader import ViewLoader, worker_options
from e2mc_hf.data.sources import ImageSource, load_images
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
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(epoch)
    underlying = getattr(batches.batch_sampler, "batch_sampler", None)
    if underlying is not None:
        underlying.set_epoch(epoch)
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
    assert same(epoch_of(here, 2)[2:], epoch_of(skip_first_batches(there, 2), 2))


def test_a_run_resumed_within_an_epoch_sees_the_rest_of_it(dataset):
    resumed = skip_first_batches(loader(dataset), 1)
    assert same(epoch_of(resumed, 5), epoch_of(loader(dataset), 5)[1:])
    assert len(resumed) == 2


def test_loading_leaves_the_global_random_state_alone(dataset):
    before = torch.get_rng_state()
    epoch_of(loader(dataset), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_gives_the_same_one_line_from_here_and_from_a_worker(num_workers):
    rows = Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}]}, features=Features({"image": Image()}))
    broken = ViewDataset(ImageSource(rows, "image", None, "tiny", None), TRANSFORM, seed=0)
    with pytest.raises(UsageError, match=r"^`dataset` must hold .* image 0 of 'tiny' .*from the dataset\.$"):
        epoch_of(loader(broken, 1, num_workers=num_workers), 0)


def test_workers_never_fork_the_training_process():
    assert worker_options(0) == {"num_workers": 0}
    assert worker_options(1)["multiprocessing_context"].get_start_method() in ("forkserver", "spawn")
