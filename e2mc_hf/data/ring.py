"""All rows of a dataset on a ring, of which every lane of a stream reads an arc of its own."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from e2mc_hf.data.seeds import derive_seed, permutation

# Tells the draw of the beginning from that of the order of the shards.
_BEGINNING = -1


class Run(NamedTuple):
    """Consecutive rows of one shard.

    Attributes:
        shard: Index of the shard.
        start: First row.
        stop: Row after the last.
    """

    shard: int
    start: int
    stop: int


class Ring:
    """The shards of one epoch, one after another in an order drawn for it, from a beginning drawn for it.

    Arcs of equal length may end anywhere in a shard: lanes have equally many rows whatever the shards' sizes, and there
    may be fewer shards than lanes. The beginning moves, so that the rows beyond the last full batch are others in every
    epoch.

    Args:
        sizes: Rows of each shard; some may be 0, not all.
        seed: Seed of the order.
        epoch: Epoch of the order.
        shuffle: False leaves the shards as they are, from row 0 on.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, epoch: int, shuffle: bool) -> None:
        self._order = permutation(len(sizes), seed, epoch) if shuffle else list(range(len(sizes)))
        self._starts = list(accumulate((sizes[shard] for shard in self._order), initial=0))
        self._length = self._starts.pop()
        self._sizes = sizes
        self._beginning = derive_seed(seed, epoch, _BEGINNING) % self._length if shuffle else 0

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the rows from `start` to `stop` (excluded), counted from the beginning, shard by shard."""
        position = (self._beginning + start) % self._length
        place = bisect_right(self._starts, position) - 1
        left = stop - start
        while left > 0:
            shard = self._order[place]
            first = position - self._starts[place]
            count = min(left, self._sizes[shard] - first)
            if count:
                yield Run(shard, first, first + count)
            left -= count
            place = (place + 1) % len(self._order)
            position = self._starts[place]
