"""The images that a list of file names picks: how ImageNet's 1% and 10% are published."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset

from e2mc_hf.errors import UsageError

# The Hub's ImageNet appends the class once more: n01440764_10026_n01440764.JPEG is n01440764_10026.JPEG of the lists.
REPEATED_CLASS = re.compile(r"^(n\d{8})_(\d+)_\1(?=\.)")


def read_file_list(path: str) -> list[str]:
    """Read a list of file names, one a line; blank lines are skipped.

    Raises:
        UsageError: If it cannot be read as text, or names nothing.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"`file_list` must be a text file of file names, got {path!r} ({type(error).__name__}). Check the path."
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UsageError(f"`file_list` must name at least one image, got {path!r}, which is empty. Fill it.")
    return names


def stored_names(dataset: Dataset, image_column: str) -> list[str | None]:
    """File names of all images as the dataset stores them, without reading an image."""
    return pc.struct_field(dataset.data.column(image_column), "path").to_pylist()  # type: ignore[no-any-return]


def find_listed(names: Sequence[str], stored: Sequence[str | None], *, source: str) -> list[int]:
    """Find the images that a list names.

    A name counts with as many of its folders as the dataset stores: most parquet files have the bare name only, a
    folder of images the whole path.

    Args:
        names: The list, `n01440764_10026.JPEG` or `n01440764/n01440764_10026.JPEG`; the same name twice counts once.
        stored: File name of each image, None where there is none.
        source: The dataset, for the message.

    Returns:
        Indices in ascending order: the order of the dataset.

    Raises:
        UsageError: If the dataset stores no file names, a name is not there, or one is that of several images.
    """
    paths = [_parts(path) if path else () for path in stored]
    depth_stored = min((len(path) for path in paths if path), default=0)
    if not depth_stored:
        raise UsageError(
            f"`file_list` must be left out for a dataset that stores no file names, got {source!r}. Leave it out."
        )
    wanted = {_parts(name)[-depth_stored:] for name in names}
    depths = {len(name) for name in wanted}
    found = [(index, key) for index, path in enumerate(paths) for d in depths if (key := path[-d:]) in wanted]
    counts = Counter(key for _, key in found)
    missing = sorted("/".join(name) for name in wanted - counts.keys())
    if missing:
        example = next("/".join(path) for path in paths if path)
        raise UsageError(
            f"`file_list` must name images of {source!r}, got {len(missing)} of {len(wanted)} names that are not there,"
            f" such as {missing[0]!r}; the dataset has names such as {example!r}. Check --train_split and the list."
        )
    ambiguous = sorted("/".join(name) for name, count in counts.items() if count > 1)
    if ambiguous:
        raise UsageError(
            f"`file_list` must name one image a line, got {ambiguous[0]!r}, which {counts[_parts(ambiguous[0])]} images"
            f" of {source!r} are called. Write its folder too."
        )
    return sorted({index for index, _ in found})


def _parts(path: str) -> tuple[str, ...]:
    """Folders and name of a path or URL, the name as the published lists have it."""
    *folders, name = path.replace("\\", "/").split("/")
    return (*(folder for folder in folders if folder not in ("", ".")), REPEATED_CLASS.sub(r"\1_\2", name))
