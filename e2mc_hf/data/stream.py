"""Images that are read in passing, from files that need not be here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from e2mc_hf.data.shards import Shard


@dataclass(frozen=True)
class StreamSource:
    """Images of one split as shards.

    An image's sample id is its place in the rows of all shards, one after another: the index it has map-style.

    Attributes:
        shards: The files.
        image_column: Column of the images.
        name: The folder's name, or the Hub id.
        revision: Commit of a Hub dataset; None for any other.
        split: Split the images are of.
    """

    shards: Sequence[Shard]
    image_column: str
    name: str
    revision: str | None
    split: str = "train"

    def __len__(self) -> int:
        return self.offsets[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Sample id of each shard's first row, and the number of images at the end."""
        return tuple(accumulate((shard.rows for shard in self.shards), initial=0))
