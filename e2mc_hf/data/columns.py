"""Which column holds the images, which the labels: told by their type, since their names differ everywhere."""

from typing import Any

from datasets import ClassLabel, Features, Image, LargeList, List, Value

from e2mc_hf.errors import UsageError

WEBDATASET_LABEL = "cls"
ENCODED_TYPES = ("binary", "large_binary")


def find_image_column(features: Features, named: str | None, *, name: str) -> str:
    """Find the one column of images.

    Files written by other programs than `datasets` do not say which column is an image: without a column that does,
    one of `{bytes, path}` counts, and so does one of plain bytes if named.

    Args:
        features: The columns.
        named: The user's choice, if any.
        name: The dataset, for the message.

    Raises:
        UsageError: If `named` is no column of images, or there are none or several to choose from; a column with
            several images a row is none.
    """
    stated = [column for column, feature in features.items() if isinstance(feature, Image)]
    candidates = stated or [column for column, feature in features.items() if _is_encoded_file(feature)]
    if named is not None and named not in features:
        raise UsageError(
            f"`image_column` must be a column of images, got {named!r}."
            f" Choose from the columns of {name!r}: {describe_columns(features)}."
        )
    if named is not None and not _can_hold_an_image(features[named]):
        several = " with one image a row" if _is_list(features[named]) else ""
        raise UsageError(
            f"`image_column` must be a column of images{several}, got {named!r}."
            f" Choose from the columns of {name!r}: {describe_columns(features)}."
        )
    if named is None and len(candidates) != 1:
        raise UsageError(
            f"`image_column` can be left out only with one column of images (one image a row), got {len(candidates)}."
            f" Pass one of the columns of {name!r}: {describe_columns(features)}."
        )
    return named or candidates[0]


def find_label_column(features: Features, named: str | None, *, name: str) -> str | None:
    """Find the one column of classes; plain integers count only if named, or called `cls` as webdataset's labels are.

    Args:
        features: The columns.
        named: The user's choice, if any.
        name: The dataset, for the message.

    Returns:
        The column; None if there are none or several, which matters only to whoever asks for the labels.

    Raises:
        UsageError: If `named` is neither a column of classes nor of integers.
    """
    candidates = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if named is None:
        if not candidates and _is_integer(features.get(WEBDATASET_LABEL)):
            return WEBDATASET_LABEL
        return candidates[0] if len(candidates) == 1 else None
    if named not in candidates and not _is_integer(features.get(named)):
        raise UsageError(
            f"`label_column` must be a column of type ClassLabel or integer, got {named!r}."
            f" Choose from the columns of {name!r}: {describe_columns(features)}."
        )
    return named


def describe_columns(features: Features) -> str:
    """List the columns with their types."""
    return ", ".join(f"{name} ({_describe(feature)})" for name, feature in features.items())


def _describe(feature: Any) -> str:
    if _is_list(feature):
        return f"list of {_describe(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList))


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype


def _is_encoded_file(feature: Any) -> bool:
    """Whether a column is what an image is stored as, without saying so."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"} and _is_bytes(feature["bytes"])


def _is_bytes(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ENCODED_TYPES


def _can_hold_an_image(feature: Any) -> bool:
    return isinstance(feature, Image) or _is_encoded_file(feature) or _is_bytes(feature)
