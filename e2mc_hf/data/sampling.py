"""The order of images that can be read at any place: one permutation of all of them."""

from collections.abc import Iterator

from e2mc_hf.data.order import BatchOrder
from e2mc_hf.data.rows import Row
from e2mc_hf.data.seeds import permutation


class GlobalBatchSampler(BatchOrder):
    """Cut each global batch into one contiguous slice a process.

    An epoch is one permutation of all images, known to every process. Two processes with batches of N/2 thus train on
    the very batches of one process with N.

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
        super().__init__(num_samples, batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)

    def batches(self, epoch: int, start: int) -> Iterator[list[Row]]:
        """Yield the batches of an epoch from the one numbered `start` on; their images are left to be read."""
        order = permutation(self.num_samples, self.seed, epoch) if self.shuffle else range(self.num_samples)
        for batch in range(start, len(self)):
            first = batch * self.global_batch_size + self.rank * self.batch_size
            yield [Row(epoch, index) for index in order[first : first + self.batch_size]]
