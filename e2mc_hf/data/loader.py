"""Batches of views for the trainer, from this process or from workers."""

import logging
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from e2mc_hf.data.collator import collate_views
from e2mc_hf.data.dataset import Sample, ViewDataset
from e2mc_hf.data.order import BatchOrder
from e2mc_hf.data.rows import Row
from e2mc_hf.data.sampling import GlobalBatchSampler
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.stream_order import StreamBatchSampler
from e2mc_hf.data.unreadable import UnreadableCount
from e2mc_hf.data.worker_watch import WorkerWatch
from e2mc_hf.data.workers import (
    LostWorkersError,
    UnusableWorkersError,
    lost_workers_noticed,
    next_batch,
    stop_workers,
    worker_options,
    workers_errors_as_here,
)

logger = logging.getLogger(__name__)

_MOST_RESTARTS = 3


def batch_order(
    dataset: ViewDataset,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool = True,
    lanes: int | None = None,
) -> BatchOrder:
    """Which images are in which batch of this process.

    Raises:
        UsageError: If the images do not fill one batch of all processes.
    """
    if isinstance(dataset.source, StreamSource):
        return StreamBatchSampler(
            dataset.source,
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            shuffle_window=dataset.shuffle_window,
            lanes=dataset.lanes if lanes is None else lanes,
        )
    return GlobalBatchSampler(len(dataset), batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)


class _Rest(Sampler[list[Row]]):
    """What is left of an epoch after `start` batches; a DataLoader begins it more than once to make one iterator."""

    def __init__(self, order: BatchOrder, watch: WorkerWatch) -> None:
        self.order = order
        self.watch = watch
        self.start = 0
        self.sample_ids: dict[int, list[int]] = {}  # of the batches under way, by their number in the epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Row]]:
        self.order.skip(self.start)
        return self._rows(iter(self.order), self.start)

    def _rows(self, batches: Iterator[list[Row]], start: int) -> Iterator[list[Row]]:
        """Rows of each batch, reading which is not the workers' time."""
        for number in count(start):
            with self.watch.paused():
                rows = next(batches, None)
            if rows is None:
                return
            self.sample_ids[number] = [row.sample_id for row in rows]
            yield rows


class ViewLoader(DataLoader[Sample]):
    """Global batches of views; hand it to the trainer as it is, not prepared by accelerate (that would cut it twice).

    Workers decode and crop; colors, blur and normalization are done here, a batch at a time, on the training device.
    Batches are functions of (seed, epoch, place), so workers that die or freeze are started again where they were.

    Args:
        dataset: Draws the views.
        batch_size: Images of one step on each process.
        rank: This process.
        world_size: All processes.
        seed: Seed of the order.
        shuffle: False keeps the order of the dataset.
        num_workers: Processes that decode and crop; 0 does it here. They change no value.
        pin_memory: Copy batches to pinned memory, for a GPU.
        device: Where the views go.
        worker_timeout: Seconds without a batch after which workers count as frozen.
        lanes: Places a stream is read from, in place of the dataset's own number: those of the run that is resumed.

    Attributes:
        order: Which images are in which batch.
        unreadable: Images of the delivered batches that could not be read; the trainer resets it.
        sample_ids: Images of the batch delivered last; in the place of one that could not be read stands another.
    """

    dataset: ViewDataset

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
        device: torch.device | str = "cpu",
        worker_timeout: float = 120.0,
        lanes: int | None = None,
    ) -> None:
        self.order = batch_order(
            dataset, batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle, lanes=lanes
        )
        self.unreadable = UnreadableCount()
        self.sample_ids: list[int] = []
        self._device = torch.device(device)
        self._watch = WorkerWatch(worker_timeout)
        self._rest = _Rest(self.order, self._watch)
        self._skipped = 0
        super().__init__(
            dataset,
            batch_sampler=self._rest,
            collate_fn=collate_views,
            pin_memory=pin_memory,
            # A loader draws a seed for its workers: from its own generator, the model's random state stays as it was.
            generator=torch.Generator().manual_seed(seed),
            **worker_options(num_workers),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and views the next iteration gives."""
        self.order.set_epoch(epoch)

    def skip(self, num_batches: int) -> None:
        """Begin the next iteration, and only that, after so many batches; they are not read."""
        self._skipped = num_batches

    def __iter__(self) -> Iterator[dict[str, list[Tensor]]]:  # type: ignore[override]
        """Yield the batches of the epoch as normalized float32 views on the device.

        Raises:
            UsageError: If an image and those in its place cannot be read, or workers were lost too often.
        """
        for batch in self._batches():
            self.unreadable.add(len(batch["views"][0]), batch["unreadable"])
            views = [view.to(self._device, non_blocking=self._device.type == "cuda") for view in batch["views"]]
            yield {"views": self.dataset.transform.photometry(views, batch["photometry"])}

    def _batches(self) -> Iterator[dict[str, list[Any]]]:
        """Yield what the workers made, starting lost ones again at the batch that is due."""
        done, self._skipped = self._skipped, 0
        restarts = 0
        while True:
            self._rest.start = done
            try:
                with workers_errors_as_here():
                    # Workers of the epoch before are asked first whether they are ready: one may have been lost since.
                    with lost_workers_noticed(self._iterator, self._watch):
                        batches = super().__iter__()
                    while (batch := next_batch(batches, self._watch)) is not None:
                        self.sample_ids = self._rest.sample_ids.pop(done)
                        done += 1
                        yield batch
                return
            except LostWorkersError as error:
                stop_workers(self._iterator)
                self._iterator = None
                restarts += 1
                if restarts > _MOST_RESTARTS:
                    raise UnusableWorkersError(
                        f"`dataloader_num_workers` processes were lost {restarts} times in one epoch, last: {error}"
                        " Look for a lack of memory, or pass fewer workers (0 decodes in the training process); if"
                        " they are only slow, raise --worker_timeout."
                    ) from error
                logger.warning(
                    "%s They are started again at batch %d (%d of %d).", error, done, restarts, _MOST_RESTARTS
                )
