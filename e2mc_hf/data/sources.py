"""Where images come from: the embedded digits, a local folder, or the Hub; one record whatever the origin."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from jaxtyping import Int64
from PIL import Image as PillowImage

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.columns import describe_columns, find_image_column, find_label_column
from e2mc_hf.data.decoding import to_rgb
from e2mc_hf.data.digits import digits_splits
from e2mc_hf.errors import UsageError

TEST_SPLITS = ("test", "validation")
SUBSET_SEED = 0


@dataclass(frozen=True)
class ImageSource:
    """Images of one split, with labels if it has any.

    Attributes:
        dataset: The rows.
        image_column: Column of the images.
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
                f" ({_cause(error)}). Repair it, or remove it from the dataset."
            ) from error

    def labels(self) -> Int64[np.ndarray, " N"]:
        """Read all labels without decoding an image.

        Raises:
            UsageError: If there is no label column, several to choose from, or an image without a label.
        """
        column = self._label_column
        values = self.dataset.select_columns([column])[:][column]
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
        if (labels < 0).any():
            raise UsageError(
                f"`label_column` must give every image a label, got {int((labels < 0).sum())} of {len(labels)} without"
                f" in column {column!r} of {self.name!r}. Choose a split that is labeled."
            )
        return labels

    @property
    def num_classes(self) -> int:
        """Number of classes: those the column declares, or the largest label + 1 of a plain integer column."""
        feature = self.dataset.features[self._label_column]
        return int(feature.num_classes if isinstance(feature, ClassLabel) else self.labels().max() + 1)

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
        return self.dataset.select_columns([self.image_column])


def load_images(arguments: DataArguments, split: str) -> ImageSource:
    """Load one split.

    `digits` is the embedded dataset, an existing folder is read as it is (parquet files, or images in a folder a
    class), anything else is a Hub id. `max_samples` keeps the first images of a shuffle with seed 0.

    Raises:
        UsageError: If the dataset, the split or its columns are not there.
    """
    return _select(arguments, _load_splits(arguments), split)


def load_test_images(arguments: DataArguments, test_split: str | None) -> ImageSource:
    """Load the split to test on: the one named, or else `test` or `validation`, whichever is there first.

    Raises:
        UsageError: As `load_images`; also if neither is there.
    """
    splits = _load_splits(arguments)
    split = test_split or next((name for name in TEST_SPLITS if name in splits), None)
    if split is None:
        raise UsageError(
            f"`test_split` must be given when a dataset has neither test nor validation,"
            f" got splits {', '.join(splits)} in {arguments.dataset!r}. Pass --test_split with one of them."
        )
    return _select(arguments, splits, split)


def _load_splits(arguments: DataArguments) -> Mapping[str, Dataset]:
    """Load every split there is."""
    path = Path(arguments.dataset).expanduser()
    embedded = arguments.dataset == "digits"
    if (embedded or path.is_dir()) and arguments.dataset_revision is not None:
        warnings.warn(f"`dataset_revision` has no effect on {arguments.dataset!r}: only the Hub has it.", stacklevel=3)
    if embedded:
        return digits_splits()
    try:
        splits: Mapping[str, Dataset] = load_dataset(
            str(path) if path.is_dir() else arguments.dataset,
            name=arguments.dataset_config,
            revision=None if path.is_dir() else arguments.dataset_revision,
        )
    except Exception as error:  # datasets, the Hub client, Arrow and HTTP each have their own
        raise UsageError(_load_failure(arguments.dataset, path.is_dir(), error)) from error
    return splits


def _select(arguments: DataArguments, splits: Mapping[str, Dataset], split: str) -> ImageSource:
    """Pick the split, the columns and the sample."""
    if split not in splits:
        raise UsageError(
            f"`train_split` and `test_split` must name a split of {arguments.dataset!r} ({', '.join(splits)}),"
            f" got {split!r}. Pass one of these."
        )
    dataset = splits[split]
    image_column = find_image_column(dataset.features, arguments.image_column, name=arguments.dataset)
    label_column = find_label_column(dataset.features, arguments.label_column, name=arguments.dataset)
    if arguments.max_samples is not None and arguments.max_samples < len(dataset):
        dataset = dataset.shuffle(seed=SUBSET_SEED, keep_in_memory=True).select(range(arguments.max_samples))
    path = Path(arguments.dataset).expanduser()
    return ImageSource(
        dataset=dataset,
        image_column=image_column,
        label_column=label_column,
        name=path.resolve().name if path.is_dir() else arguments.dataset,
        revision=_commit(splits[split]),
        split=split,
    )


def _load_failure(dataset: str, is_folder: bool, error: Exception) -> str:
    """Say in one line why a dataset could not be loaded and what to do."""
    if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)) and is_folder:
        return (
            f"`dataset` must be a folder with parquet files or images, got {dataset!r}, which holds neither. Fill it."
        )
    if is_folder:
        return (
            f"`dataset` must be a readable folder of parquet files or images, got {dataset!r}"
            f" ({_cause(error)}). Repair its files, or check --dataset_config."
        )
    if isinstance(error, ConnectionError):
        return (
            f"`dataset` must be `digits`, an existing folder or a Hub id, got {dataset!r}: no such folder, and the Hub"
            " cannot be reached. Check the path; for the Hub, the network and HF_HUB_OFFLINE."
        )
    return (
        f"`dataset` must be `digits`, an existing folder or a Hub id, got {dataset!r} ({_cause(error)})."
        " Check the name, --dataset_config, --dataset_revision and your access."
    )


def _cause(error: BaseException) -> str:
    """Shorten an exception, or the one it hides, to part of a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _commit(dataset: Dataset) -> str | None:
    """Find the Hub commit a dataset was downloaded from: `datasets` names the folder of its cache after it."""
    folders = (Path(file["filename"]).parent.name for file in dataset.cache_files)
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
