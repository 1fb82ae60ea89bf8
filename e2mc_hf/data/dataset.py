"""An image source as torch datasets: views to train on, or one tensor and its label to evaluate with."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from e2mc_hf.data.sources import ImageSource
from e2mc_hf.data.views import ViewTransform


class ViewDataset(Dataset[list[Tensor]]):
    """The views of each image, drawn anew every epoch.

    The epoch travels with the index: workers that live for the whole run hold a copy of the dataset, which no
    `set_epoch` of the main process would reach.

    Args:
        source: The images; an image's index in it is its sample id.
        transform: Draws the views.
        seed: Seed of all draws.
    """

    def __init__(self, source: ImageSource, transform: ViewTransform, *, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> list[Tensor]:
        """Draw the views for `(epoch, index)`; an index alone means epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.transform(self.source.image(index), seed=self.seed, epoch=epoch, sample_id=index)


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
