"""What travels from the order of a run to the workers: which image, in which epoch, and its bytes if they were read."""

from typing import NamedTuple


class Row(NamedTuple):
    """One place in a batch.

    Attributes:
        epoch: Epoch the views are drawn for.
        sample_id: Index of the image in the whole dataset, the same map-style and streamed.
        encoded: Bytes of the image file; None leaves the reading to the worker (map-style).
        spares: Rows that stand in when the image cannot be read, shared by several rows: the one at
            `sample_id % len(spares)` first, then those behind it, then those before.
    """

    epoch: int
    sample_id: int
    encoded: bytes | None = None
    spares: tuple["Row", ...] = ()
