"""Batches of views for the trainer, from this process or from workers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from e2mc_hf.data.collator import collate_views
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sampling import GlobalBatchSampler
from e2mc_hf.data.workers import worker_options, workers_errors_as_here


class ViewLoader(DataLoader[list[Tensor]]):
    """Global batches of views; hand it to the trainer as it is, not prepared by accelerate (that would cut it twice).

    Args:
        dataset: Draws the views.
        batch_size: Images of one step on each process.
        rank: This process.
        world_size: All processes.
        seed: Seed of the order.
        shuffle: False keeps the order of the dataset.
        num_workers: Processes that decode and augment; 0 does it here. They change no value.
        pin_memory: Copy batches to pinned memory, for a GPU.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=GlobalBatchSampler(
                len(dataset), batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle
            ),
            collate_fn=collate_views,
            pin_memory=pin_memory,
            # A loader draws a seed for its workers: from its own generator, the model's random state stays as it was.
            generator=torch.Generator().manual_seed(seed),
            **worker_options(num_workers),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and views the next iteration gives."""
        assert isinstance(self.batch_sampler, GlobalBatchSampler)
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, list[Tensor]]]:  # type: ignore[override]
        """Yield the batches of the epoch; a user's error in a worker reads as it does here."""
        with workers_errors_as_here():
            yield from super().__iter__()
