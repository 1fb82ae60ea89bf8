"""The order of images that can be read at any place: one permutation of all of them."""

from collections.abc import Iterator

from e2mc_hf.data.order import BatchOrder
from e2mc_hf.data.rows import Row
from e2mc_hf.data.seeds import permutation


class GlobalBatchSampler(BatchOrder):
    """Cut each global batch into one contiguous slice a process.

    An epoch is one permutation of all images, known to every process. Two processes with batches of N/2 thus train on
    the very batches of one process with N.
    """

    def batches(self, epoch: int, start: int) -> Iterator[list[Row]]:
        """Yield the batches of an epoch from the one numbered `start` on; their images are left to be read."""
        order = permutation(self.num_samples, self.seed, epoch) if self.shuffle else range(self.num_samples)
        for batch in range(start, len(self)):
            first = batch * self.global_batch_size + self.rank * self.batch_size
            yield [Row(epoch, index) for index in order[first : first + self.batch_size]]
