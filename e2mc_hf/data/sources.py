"""Where images come from: the embedded digits, a local folder, files, or the Hub; one record whatever the origin."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, Image, concatenate_datasets, load_dataset

from e2mc_hf.data.catalog import fill_in, find_entry
from e2mc_hf.data.columns import find_image_column, find_label_column
from e2mc_hf.data.digits import digits_splits
from e2mc_hf.data.file_lists import find_listed, read_file_list, stored_names
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.load_errors import load_failure
from e2mc_hf.data.resolving import is_on_hub, loading_options, open_stream, source_name, split_parts
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.distributed import run_on_first
from e2mc_hf.errors import UsageError
from e2mc_hf.image_arguments import DataArguments

TEST_SPLITS = ("test", "validation")
SUBSET_SEED = 0

__all__ = ["ImageSource", "StreamSource", "load_images", "load_test_images"]


def load_images(arguments: DataArguments, split: str) -> ImageSource | StreamSource:
    """Load one split.

    `digits` is the embedded dataset, an existing folder is read as it is (parquet files, tars of webdataset, or images
    in a folder a class), parquet, webdataset and imagefolder read `data_files`, anything else is a name of the catalog
    or a Hub id. Several splits are joined by +. `file_list` keeps the images it names, `max_samples` the first of a
    shuffle with seed 0.

    Returns:
        A stream with `streaming`: its files are found by one process, for all of them.

    Raises:
        UsageError: If the dataset, the split or its columns are not there, or a stream cannot be made of them; with
            `streaming` on all processes alike.
    """
    arguments = fill_in(arguments)
    _warn_of_revision(arguments)
    if arguments.streaming:
        return run_on_first(lambda: _open_stream(arguments, split))
    return _select(arguments, _load_splits(arguments), split)


def load_test_images(arguments: DataArguments, test_split: str | None) -> ImageSource:
    """Load the split to test on: the one named, or the catalog's, or `test` or `validation`, whichever is there first.

    A `file_list` is one of training images and does not count here.

    Raises:
        UsageError: As `load_images`; also if no split is named and there is none to test on, or with `streaming`.
    """
    if arguments.streaming:
        raise UsageError(
            "`streaming` must be left out in evaluation, which needs labels and reads images more than once, got True."
            " Leave it out."
        )
    arguments = replace(fill_in(arguments), file_list=None)
    _warn_of_revision(arguments)
    splits = _load_splits(arguments)
    row = find_entry(arguments.dataset) if is_on_hub(arguments) else None
    usual = (row.test_split, *TEST_SPLITS) if row else TEST_SPLITS
    split = test_split or next((name for name in usual if name in splits), None)
    if split is None:
        raise UsageError(
            f"`test_split` must be given when a dataset has neither test nor validation,"
            f" got splits {', '.join(splits)} in {arguments.dataset!r}. Pass --test_split with one of them."
        )
    return _select(arguments, splits, split)


def _open_stream(arguments: DataArguments, split: str) -> StreamSource:
    try:
        return open_stream(arguments, split)
    except UsageError:
        raise
    except Exception as error:  # datasets, the Hub client, Arrow and HTTP each have their own
        raise UsageError(load_failure(arguments, error)) from error


def _load_splits(arguments: DataArguments) -> Mapping[str, Dataset]:
    """Load every split there is."""
    if arguments.dataset == "digits":
        return digits_splits()
    try:
        splits: Mapping[str, Dataset] = load_dataset(**loading_options(arguments))
    except Exception as error:  # datasets, the Hub client, Arrow and HTTP each have their own
        raise UsageError(load_failure(arguments, error)) from error
    return splits


def _select(arguments: DataArguments, splits: Mapping[str, Dataset], split: str) -> ImageSource:
    """Pick the split, the columns and the sample."""
    parts = [splits[part] for part in split_parts(split, splits, arguments.dataset)]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    image_column = find_image_column(dataset.features, arguments.image_column, name=arguments.dataset)
    label_column = find_label_column(dataset.features, arguments.label_column, name=arguments.dataset)
    if not isinstance(dataset.features[image_column], Image):
        dataset = dataset.cast_column(image_column, Image())
    if arguments.file_list is not None:
        listed = read_file_list(arguments.file_list)
        names = stored_names(dataset, image_column)
        dataset = dataset.select(find_listed(listed, names, source=arguments.dataset))
    if arguments.max_samples is not None and arguments.max_samples < len(dataset):
        dataset = dataset.shuffle(seed=SUBSET_SEED, keep_in_memory=True).select(range(arguments.max_samples))
    name, revision = source_name(arguments), _commit(parts[0])
    source = ImageSource(dataset, image_column, label_column, name, revision, split)
    _warn_of_classes(arguments, source)
    return source


def _warn_of_revision(arguments: DataArguments) -> None:
    if arguments.dataset_revision is not None and not is_on_hub(arguments):
        warnings.warn(f"`dataset_revision` has no effect on {arguments.dataset!r}: only the Hub has it.", stacklevel=3)


def _warn_of_classes(arguments: DataArguments, source: ImageSource) -> None:
    """Say when a dataset of the catalog has another number of classes than the papers' has."""
    row = find_entry(arguments.dataset) if is_on_hub(arguments) else None
    declared = source.declared_classes
    if row and declared is not None and arguments.label_column == row.label_column and declared != row.num_classes:
        warnings.warn(
            f"{arguments.dataset!r} has {declared} classes in column {source.label_column!r}, the papers' {row.title}"
            f" has {row.num_classes}: results may not compare.",
            stacklevel=4,
        )


def _commit(dataset: Dataset) -> str | None:
    """Find the Hub commit a dataset was downloaded from: `datasets` names the folder of its cache after it."""
    folders = (Path(file["filename"]).parent.name for file in dataset.cache_files)
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
