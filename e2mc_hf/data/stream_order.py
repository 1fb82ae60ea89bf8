"""The order of a stream: full batches, each image once, the same for any number of processes, exact from any batch."""

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain

from e2mc_hf.data.order import BatchOrder
from e2mc_hf.data.read_ahead import ReadAhead
from e2mc_hf.data.ring import Ring
from e2mc_hf.data.rows import Row
from e2mc_hf.data.seeds import permutation
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.errors import UsageError

_NUM_SPARES = 4


class StreamBatchSampler(BatchOrder):
    """Read a stream in lanes, and take equally many rows of each lane into every global batch.

    A lane is an arc of the epoch's ring of rows, cut into blocks of `shuffle_window` rows that are read as they lie and
    then permuted. Order and blocks depend on the lanes and not on the processes, which divide the lanes among them:
    two processes with batches of N/2 train on the very batches of one process with N and two lanes. More lanes mix
    better, and read more places at once.

    A row holds its image. Rows of one batch and lane share up to four spares, of the same block but not of that batch
    (unless an epoch is one batch): the row with sample id `i` is to try spare `i % len(spares)` first.

    Args:
        source: The images.
        batch_size: Images of one step on each process.
        rank: This process.
        world_size: All processes.
        seed: Seed of the order.
        shuffle: False keeps the order of the dataset in every epoch, lane by lane.
        shuffle_window: Most images of a lane that are shuffled together, but at least what a batch and its spares take.
            A process holds twice as many for each of its lanes, undecoded.
        lanes: Places the stream is read from, over all processes: a multiple of these, and a divisor of the global
            batch. One a process when not given.

    Raises:
        UsageError: If the images do not fill one global batch, or the lanes cannot be divided.
    """

    def __init__(
        self,
        source: StreamSource,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        shuffle_window: int = 1000,
        lanes: int | None = None,
    ) -> None:
        super().__init__(len(source), batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)
        self.source = source
        self.shuffle_window = shuffle_window
        self.lanes = world_size if lanes is None else lanes
        if self.lanes < 1 or self.lanes % world_size or self.global_batch_size % self.lanes:
            raise UsageError(
                f"`lanes` must be a multiple of the {world_size} processes and divide the batch of"
                f" {self.global_batch_size} over all of them, got {lanes}. Leave it out, or use as many processes."
            )
        self._chunk_size = self.global_batch_size // self.lanes
        self._lane_rows = len(self) * self._chunk_size
        self._edges = _block_edges(self._lane_rows, shuffle_window, self._chunk_size + _NUM_SPARES)

    def batches(self, epoch: int, start: int) -> Iterator[list[Row]]:
        """Yield the batches of an epoch from the one numbered `start` on; nothing before its block is read."""
        own = self.lanes // self.world_size
        ring = Ring([shard.rows for shard in self.source.shards], seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        position = start * self._chunk_size
        block = bisect_right(self._edges, position) - 1
        sizes = [stop - start for start, stop in zip(self._edges[block:-1], self._edges[block + 1 :], strict=True)]
        with ExitStack() as stack:
            lanes = []
            for lane in range(self.rank * own, (self.rank + 1) * own):
                rows = self._rows(ring, epoch, lane, self._edges[block])
                blocks = stack.enter_context(ReadAhead(rows, sizes))
                shuffled = self._shuffled(blocks, epoch, lane, block)
                lanes.append(_chunks(shuffled, self._chunk_size, position - self._edges[block]))
            for chunks in zip(*lanes, strict=True):
                yield list(chain(*chunks))

    def _rows(self, ring: Ring, epoch: int, lane: int, start: int) -> Generator[Row, None, None]:
        """Read a lane from its row `start` on, in the order of the shards."""
        first = lane * self._lane_rows
        for run in ring.runs(first + start, first + self._lane_rows):
            sample_ids = range(self.source.offsets[run.shard] + run.start, self.source.offsets[run.shard] + run.stop)
            images = self.source.shards[run.shard].read(run.start, run.stop)
            for sample_id, encoded in zip(sample_ids, images, strict=True):
                yield Row(epoch, sample_id, encoded or b"")

    def _shuffled(self, blocks: Iterable[list[Row]], epoch: int, lane: int, first: int) -> Iterator[list[Row]]:
        """Permute each block, the first of which is numbered `first`."""
        for block, rows in enumerate(blocks, first):
            order = permutation(len(rows), self.seed, epoch, lane, block) if self.shuffle else range(len(rows))
            yield [rows[index] for index in order]


def _block_edges(rows: int, window: int, smallest: int) -> list[int]:
    """Cut the rows of a lane into blocks of equal size: at most `window`, at least `smallest` if there are as many."""
    blocks = max(1, min(-(-rows // window), rows // smallest))
    return [rows * block // blocks for block in range(blocks + 1)]


def _chunks(blocks: Iterable[list[Row]], size: int, skipped: int) -> Iterator[list[Row]]:
    """Cut blocks, after the first `skipped` rows, into chunks of `size` rows with their spares."""
    chunk: list[Row] = []
    spares: tuple[Row, ...] = ()
    for block in blocks:
        position, skipped = skipped, 0
        while position < len(block):
            if not chunk:
                spares = _spares(block, position, size)
            taken = block[position : position + size - len(chunk)]
            chunk += taken
            position += len(taken)
            if len(chunk) == size:
                yield [row._replace(spares=spares) for row in chunk]
                chunk = []


def _spares(block: list[Row], start: int, size: int) -> tuple[Row, ...]:
    """Choose rows of a block that are not of the chunk at `start`: those behind it, then those before it.

    A block that is no longer than the chunk has none, so there they are of the chunk itself.
    """
    behind = block[start + size : start + size + _NUM_SPARES]
    others = behind + block[: min(start, _NUM_SPARES - len(behind))]
    return tuple(others or block[:_NUM_SPARES])
