"""Which files a split consists of, how images are packed in them and in which column: all that a stream needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from datasets import Features, Image, Value, load_dataset_builder
from PIL import Image as PillowImage
from pyarrow import parquet

from e2mc_hf.data.columns import find_image_column
from e2mc_hf.data.remote_files import open_file
from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.tar_cache import COMMIT
from e2mc_hf.data.tar_shards import first_fields
from e2mc_hf.errors import UsageError
from e2mc_hf.image_arguments import BUILDERS, DataArguments

Format = Literal["parquet", "webdataset", "imagefolder"]


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        files: Local paths or URLs, in the order of the dataset; those on the Hub name the commit.
        format: parquet, webdataset or imagefolder.
        features: Columns, if the dataset declares them.
    """

    files: list[str]
    format: Format
    features: Features | None = None


def open_stream(arguments: DataArguments, split: str) -> StreamSource:
    """Find the files of a split and count their images; the images are not read.

    Raises:
        UsageError: If the split is not there, or its files cannot be streamed.
        Exception: Whatever `datasets`, the Hub client, Arrow and HTTP raise.
    """
    found = find_files(arguments, split)
    image_column = find_image_column(_features(found), arguments.image_column, name=arguments.dataset)
    commit = COMMIT.search(found.files[0])
    return StreamSource(
        shards=open_shards(found.files, found.format, image_column),
        image_column=image_column,
        name=source_name(arguments),
        revision=commit[1] if commit else None,
        split=split,
    )


def find_files(arguments: DataArguments, split: str) -> SplitFiles:
    """Find the files of a split.

    URLs without wildcards are taken as they are: `datasets` would ask a server three times for each.

    Raises:
        UsageError: If the split is not there, or its files are in another format.
        Exception: Whatever `datasets` and the Hub client raise.
    """
    named = [arguments.data_files] if isinstance(arguments.data_files, str) else arguments.data_files
    if named and arguments.dataset in BUILDERS and all(_is_plain_url(name) for name in named):
        split_parts(split, ["train"], arguments.dataset)
        return SplitFiles(named, cast(Format, arguments.dataset))
    builder = load_dataset_builder(**loading_options(arguments))
    if builder.name not in BUILDERS:
        raise UsageError(
            f"`streaming` must be left out for files of format {builder.name}, got True for {arguments.dataset!r}."
            f" Leave it out: {', '.join(BUILDERS)} can be streamed, the rest is copied first."
        )
    of_split = {str(name): list(files) for name, files in builder.config.data_files.items()}
    files = [file for part in split_parts(split, of_split, arguments.dataset) for file in of_split[part]]
    if not files:
        raise FileNotFoundError("there are no such files")
    return SplitFiles(files, builder.name, builder.info.features)


def split_parts(split: str, there: Iterable[str], dataset: str) -> list[str]:
    """Names of the splits that `split` adds up: train+validation is both.

    Raises:
        UsageError: If one of them is not there, or one is there twice.
    """
    parts, names = split.split("+"), list(there)
    if not set(parts) <= set(names) or len(set(parts)) < len(parts):
        raise UsageError(
            f"`train_split` and `test_split` must name a split of {dataset!r} ({', '.join(names)}),"
            f" got {split!r}. Pass one of these, or several joined by +."
        )
    return parts


def loading_options(arguments: DataArguments) -> dict[str, object]:
    """Options by which `datasets` finds the same files, map-style or not."""
    path = Path(arguments.dataset).expanduser()
    return {
        "path": str(path) if path.is_dir() else arguments.dataset,
        "name": arguments.dataset_config,
        "data_files": arguments.data_files,
        "revision": arguments.dataset_revision if is_on_hub(arguments) else None,
    }


def is_on_hub(arguments: DataArguments) -> bool:
    """Whether the dataset is one of the Hub, by its id."""
    local = arguments.dataset == "digits" or arguments.dataset in BUILDERS
    return not local and not Path(arguments.dataset).expanduser().is_dir()


def source_name(arguments: DataArguments) -> str:
    """Name of a dataset in results: the folder's, the Hub id, or the format with its first file."""
    path = Path(arguments.dataset).expanduser()
    if arguments.dataset in BUILDERS and arguments.data_files:
        first = arguments.data_files if isinstance(arguments.data_files, str) else arguments.data_files[0]
        return f"{arguments.dataset}:{PurePosixPath(first.split('?')[0]).name}"
    return path.resolve().name if path.is_dir() else arguments.dataset


def _features(found: SplitFiles) -> Features:
    """Columns of the files: as declared, or as the first file has them."""
    if found.features is not None:
        return found.features
    if found.format == "imagefolder":
        return Features({"image": Image()})
    if found.format == "webdataset":
        return _tar_features(found.files[0])
    with open_file(found.files[0]) as file:
        return Features.from_arrow_schema(parquet.read_schema(file))


def _tar_features(file: str) -> Features:
    """Columns of the first sample; images told by extension."""
    extensions, columns = PillowImage.registered_extensions(), {}
    for column in first_fields(file):
        format = extensions.get(f".{column.rpartition('.')[2].lower()}")
        columns[column] = Image() if format in PillowImage.OPEN else Value("string")
    return Features(columns)


def _is_plain_url(name: str) -> bool:
    return name.startswith(("http://", "https://")) and "*" not in name
