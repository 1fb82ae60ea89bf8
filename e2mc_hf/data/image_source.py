"""Images of one split with random access: bytes to train on, pixels and labels to evaluate with."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image
from jaxtyping import Int64
from PIL import Image as PillowImage

from e2mc_hf.data.columns import describe_columns
from e2mc_hf.data.decoding import to_rgb
from e2mc_hf.data.load_errors import cause
from e2mc_hf.data.remote_files import read_if_there
from e2mc_hf.errors import UsageError


@dataclass(frozen=True)
class ImageSource:
    """Images of one split, with labels if it has any.

    Attributes:
        dataset: The rows.
        image_column: Column of the images, of type Image.
        label_column: Column of the labels; None if there is none, or no single one.
        name: `digits`, the folder's name, or the Hub id.
        revision: Commit of a Hub dataset; None for any other.
        split: Split the images are of.
    """

    dataset: Dataset
    image_column: str
    label_column: str | None
    name: str
    revision: str | None
    split: str = "train"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to workers without the cached columns: they can be the whole dataset once more."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def encoded(self, index: int) -> bytes | None:
        """Read the bytes of one image file, undecoded.

        Returns:
            The bytes; None if the dataset has no image there, or its file is gone.
        """
        stored: dict[str, Any] = self._encoded_images[index][self.image_column] or {}
        content: bytes | None = stored.get("bytes")
        if content is not None or stored.get("path") is None:
            return content
        return read_if_there(stored["path"])

    def image(self, index: int) -> PillowImage.Image:
        """Decode one image to upright RGB.

        Raises:
            UsageError: If it cannot be read; names the source, the index and the cause.
        """
        try:
            return to_rgb(self._images[index][self.image_column])
        except Exception as error:  # decoders raise whatever a broken file makes them trip over
            raise UsageError(
                f"`dataset` must hold readable images, got one that is not: image {index} of {self.name!r}"
                f" ({cause(error)}). Repair it, or remove it from the dataset."
            ) from error

    def labels(self) -> Int64[np.ndarray, " N"]:
        """Read all labels without decoding an image.

        Raises:
            UsageError: If there is no label column, several to choose from, or an image without a label.
        """
        column = self._label_column
        values = self.dataset.with_format(None).select_columns([column])[:][column]
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
        if (labels < 0).any():
            raise UsageError(
                f"`label_column` must give every image a label, got {int((labels < 0).sum())} of {len(labels)} without"
                f" in column {column!r} of {self.name!r}. Choose a split that is labeled."
            )
        return labels

    @property
    def declared_classes(self) -> int | None:
        """Number of classes that the label column declares; None if it declares none."""
        feature = self.dataset.features.get(self.label_column)
        return feature.num_classes if isinstance(feature, ClassLabel) else None

    @property
    def _label_column(self) -> str:
        """The label column, which must be there."""
        if self.label_column is None:
            raise UsageError(
                f"`label_column` must name the labels: {self.name!r} has no single column of type ClassLabel, got"
                f" {describe_columns(self.dataset.features)}. Pass --label_column, or use a labeled dataset."
            )
        return self.label_column

    @cached_property
    def _images(self) -> Dataset:
        """The image column alone: reading a row decodes every column."""
        return self.dataset.with_format(None).select_columns([self.image_column])

    @cached_property
    def _encoded_images(self) -> Dataset:
        """The image column alone, as it is stored."""
        return self._images.cast_column(self.image_column, Image(decode=False))
