"""An image source as torch datasets: views to train on, or one tensor and its label to evaluate with."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from e2mc_hf.data.decoding import EncodedImage, UnreadableImage
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.rows import Row
from e2mc_hf.data.seeds import derive_seed
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.unreadable import Unreadable
from e2mc_hf.data.views import View, ViewTransform
from e2mc_hf.errors import UsageError

# Others that are tried in place of an unreadable image; that many in a row do not happen in a usable dataset.
_MOST_STAND_INS = 20


class Sample(NamedTuple):
    """Views of one image.

    Attributes:
        views: V views.
        unreadable: The image that should have been here, when it could not be read and these are of another.
    """

    views: list[View]
    unreadable: Unreadable | None = None


class ViewDataset(Dataset[Sample]):
    """The views of each image, drawn anew every epoch.

    The epoch travels with the index: workers that live for the whole run hold a copy of the dataset, which no
    `set_epoch` of the main process would reach.

    An image that cannot be read is replaced by another, which depends on (seed, epoch, sample id) alone: batches stay
    full, and the same for any number of processes and workers.

    Args:
        source: The images; an image's index in it is its sample id.
        transform: Draws the views.
        seed: Seed of all draws.
        shuffle_window: Images that are shuffled together in each lane of a stream.
        lanes: Places a stream is read from at once, over all processes; one a process when not given.
        max_unreadable_share: Share of unreadable images above which training stops.
    """

    def __init__(
        self,
        source: ImageSource | StreamSource,
        transform: ViewTransform,
        *,
        seed: int,
        shuffle_window: int = 1000,
        lanes: int | None = None,
        max_unreadable_share: float = 0.01,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.lanes = lanes
        self.max_unreadable_share = max_unreadable_share

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Row | int) -> Sample:
        """Draw the views of a row; an index alone means epoch 0.

        Raises:
            UsageError: If neither the image nor any of those that could stand in can be read.
        """
        row = key if isinstance(key, Row) else Row(0, key)
        unreadable = None
        for candidate in chain([row], islice(self._stand_ins(row), _MOST_STAND_INS)):
            try:
                image = EncodedImage(self.encoded(candidate))
                views = self.transform(image, seed=self.seed, epoch=row.epoch, sample_id=candidate.sample_id)
            except UnreadableImage as error:
                unreadable = unreadable or error
                continue
            return Sample(views, None if unreadable is None else Unreadable(row.sample_id, unreadable.reason))
        assert unreadable is not None
        raise UsageError(
            f"`dataset` must hold readable images, got one that is not, nor are those tried in its place: image"
            f" {row.sample_id} of {self.source.name!r} ({unreadable}). Repair the dataset."
        ) from unreadable

    def first_rows(self, count: int) -> list[Row]:
        """Rows of the first images, in the order of the dataset; those of a stream are read, and stand-ins for them."""
        if not isinstance(self.source, StreamSource):
            return [Row(0, index) for index in range(min(count, len(self.source)))]
        images = chain.from_iterable(shard.read(0, shard.rows) for shard in self.source.shards)
        rows = [Row(0, index, image or b"") for index, image in enumerate(islice(images, count + _MOST_STAND_INS))]
        spares = tuple(rows[count:] + rows[:count])
        return [row._replace(spares=spares) for row in rows[:count]]

    def encoded(self, row: Row) -> bytes:
        """Bytes of an image file; none at all for an image that is missing."""
        if row.encoded is None and isinstance(self.source, ImageSource):
            return self.source.encoded(row.sample_id) or b""
        return row.encoded or b""

    def _stand_ins(self, row: Row) -> Iterator[Row]:
        """Images to take in place of an unreadable one."""
        if isinstance(self.source, StreamSource):
            start = row.sample_id % max(1, len(row.spares))
            yield from row.spares[start:] + row.spares[:start]
        elif len(self.source) > 1:
            for attempt in range(_MOST_STAND_INS):
                draw = derive_seed(self.seed, row.epoch, row.sample_id, -1, attempt)
                yield Row(row.epoch, draw % len(self.source))


class EvaluationDataset(Dataset[tuple[Tensor, int]]):
    """One tensor and its label for each image.

    Args:
        source: The images; they must have labels.
        transform: The encoder's own preparation.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform
        self.labels = source.labels()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Prepare one image."""
        return self.transform(self.source.image(index)), int(self.labels[index])
