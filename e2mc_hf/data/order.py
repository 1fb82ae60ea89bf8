"""What every order of a run can do: begin in any epoch, at any batch, with full batches on every process."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch.utils.data import Sampler

from e2mc_hf.data.rows import Row
from e2mc_hf.errors import UsageError


class BatchOrder(Sampler[list[Row]], ABC):
    """Which images are in which batch of this process.

    Every process gets the same number of batches, all of them full: an incomplete global batch at the end of an epoch
    is dropped.

    Args:
        num_samples: Images in the dataset.
        batch_size: Images of one step on each process.
        rank: This process.
        world_size: All processes.
        seed: Seed of the order.
        shuffle: False keeps the order of the dataset in every epoch.

    Attributes:
        global_batch_size: Images of one step on all processes.

    Raises:
        UsageError: If the images do not fill one global batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int, seed: int, shuffle: bool = True
    ) -> None:
        self.global_batch_size = batch_size * world_size
        if num_samples < self.global_batch_size:
            raise UsageError(
                f"`per_device_train_batch_size` times the number of processes must not exceed the {num_samples} images,"
                f" got {batch_size} x {world_size} = {self.global_batch_size}."
                f" {_remedy(num_samples // world_size)}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._skipped = 0

    @property
    def num_dropped(self) -> int:
        """Images left out of each epoch, others in every one when shuffled: fewer than a global batch."""
        return self.num_samples % self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def skip(self, num_batches: int) -> None:
        """Begin the next iteration, and only that, after so many batches; they are not read.

        Raises:
            ValueError: If an epoch has fewer batches.
        """
        if not 0 <= num_batches <= len(self):
            raise ValueError(f"`num_batches` must be in 0..{len(self)}, the batches of an epoch, got {num_batches}.")
        self._skipped = num_batches

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever is skipped."""
        return self.num_samples // self.global_batch_size

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the rows of this process, batch by batch."""
        start, self._skipped = self._skipped, 0
        return self.batches(self.epoch, start)

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[list[Row]]:
        """Yield the batches of an epoch from the one numbered `start` on."""


def _remedy(largest: int) -> str:
    """Say what to lower."""
    if largest == 0:
        return "Use fewer processes or more images."
    return f"Pass --per_device_train_batch_size {largest} or less."
