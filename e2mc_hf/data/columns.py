"""Which column holds the images, which the labels: told by their type, since their names differ everywhere."""

from datasets import ClassLabel, Features, Image, Value

from e2mc_hf.errors import UsageError


def find_image_column(features: Features, named: str | None, *, name: str) -> str:
    """Find the one column of images.

    Args:
        features: The columns.
        named: The user's choice, if any.
        name: The dataset, for the message.

    Raises:
        UsageError: If `named` is no column of images, or there are none or several to choose from.
    """
    candidates = [column for column, feature in features.items() if isinstance(feature, Image)]
    if named is not None and named not in candidates:
        raise UsageError(
            f"`image_column` must be a column of images, got {named!r}."
            f" Choose from the columns of {name!r}: {describe_columns(features)}."
        )
    if named is None and len(candidates) != 1:
        raise UsageError(
            f"`image_column` can be left out only with one column of images, got {len(candidates)}."
            f" Pass one of the columns of {name!r}: {describe_columns(features)}."
        )
    return named or candidates[0]


def find_label_column(features: Features, named: str | None, *, name: str) -> str | None:
    """Find the one column of classes; plain integers count only if named.

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
        return candidates[0] if len(candidates) == 1 else None
    feature = features.get(named)
    if named not in candidates and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise UsageError(
            f"`label_column` must be a column of type ClassLabel or integer, got {named!r}."
            f" Choose from the columns of {name!r}: {describe_columns(features)}."
        )
    return named


def describe_columns(features: Features) -> str:
    """List the columns with their types."""
    return ", ".join(
        f"{name} ({feature.dtype if isinstance(feature, Value) else type(feature).__name__})"
        for name, feature in features.items()
    )
