"""The order of the images: the same global batches, in the same order, whatever the number of processes."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from e2mc_hf.data.seeds import permutation
from e2mc_hf.errors import UsageError


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Cut each global batch into one contiguous slice a process.

    An epoch is one permutation of all images, known to every process. Two processes with batches of N/2 thus train on
    the very batches of one process with N. An incomplete global batch at the end of an epoch is dropped.

    Args:
        num_samples: Images in the dataset.
        batch_size: Images of one step on each process.
        rank: This process.
        world_size: All processes.
        seed: Seed of the order.
        shuffle: False keeps the order of the dataset in every epoch.

    Raises:
        UsageError: If the images do not fill one global batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if num_samples < batch_size * world_size:
            raise UsageError(
                f"`per_device_train_batch_size` times the number of processes must not exceed the {num_samples} images,"
                f" got {batch_size} x {world_size} = {batch_size * world_size}."
                f" {_remedy(num_samples // world_size)}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, index) pairs of this process, batch by batch."""
        epoch = self.epoch
        order = permutation(self.num_samples, self.seed, epoch) if self.shuffle else range(self.num_samples)
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


def _remedy(largest: int) -> str:
    """Say what to lower."""
    if largest == 0:
        return "Use fewer processes or more images."
    return f"Pass --per_device_train_batch_size {largest} or less."
