"""Datasets of the papers by name: what the user left out is filled in.

`python -m e2mc_hf.data.catalog > e2mc_hf/DATASETS.md` writes the table for reading.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from e2mc_hf.data.paper_datasets import CATALOG, PaperDataset
from e2mc_hf.errors import UsageError
from e2mc_hf.image_arguments import DataArguments

_INTRODUCTION = """\
# Datasets

Made from the code by `python -m e2mc_hf.data.catalog > e2mc_hf/DATASETS.md`; a test compares. Pass a name of the table
as `--dataset` (capitals, hyphens and underscores do not matter) and id, configuration, columns and splits are filled
in; options you give win. A Hub id of the table, written in full, is filled in the same way. In Python:

    from e2mc_hf.arguments import DataArguments
    from e2mc_hf.data.sources import load_images

    load_images(DataArguments(dataset="cifar-100"), "train")

Any other Hub dataset, folder or list of files is loaded without a row here. Ids, columns and splits were read where the
column *seen in* says (Hub page: its card, files or viewer, and the columns in public code that loads it); none was run
against the Hub, which cannot be reached where this was written. A label column that declares another number of classes
gives a warning. *Gated*: accept the terms on the dataset's page and set HF_TOKEN.
"""


def find_entry(dataset: str) -> PaperDataset | None:
    """Find a dataset by its name here or by its Hub id; None if it is not in the catalog."""
    name, hub_id = _plain(dataset), dataset.lower()
    return next((row for row in CATALOG if name == _plain(row.name) or hub_id == (row.hub_id or "").lower()), None)


def fill_in(arguments: DataArguments) -> DataArguments:
    """Fill in what the catalog knows of a dataset and the user did not say.

    An existing folder of the same name is left alone.

    Raises:
        UsageError: If the Hub has no copy to trust, or the dataset is picked by a list that was not given.
    """
    row = None if Path(arguments.dataset).expanduser().is_dir() else find_entry(arguments.dataset)
    if row is None:
        return arguments
    if row.hub_id is None:
        raise UsageError(
            f"`dataset` must be a folder or a Hub id for {row.title}, got {arguments.dataset!r}. {row.note}"
        )
    if row.list_url and arguments.file_list is None:
        raise UsageError(
            f"`file_list` must name the images of {row.name}, got None."
            f" Download {row.list_url} and pass it as --file_list, without --streaming."
        )
    return replace(
        arguments,
        dataset=row.hub_id,
        dataset_config=arguments.dataset_config or row.config,
        dataset_revision=arguments.dataset_revision or row.revision,
        image_column=arguments.image_column or row.image_column,
        label_column=arguments.label_column or row.label_column,
    )


def catalog_text() -> str:
    """Table of all datasets."""
    names = ("name", "dataset", "Hub id", "image, label", "train / test", "classes", "metric", "seen in", "note")
    lines = [names, ("---",) * len(names), *map(_cells, CATALOG)]
    return "\n".join([_INTRODUCTION, *_rows(lines), ""])


def _cells(row: PaperDataset) -> tuple[str, ...]:
    hub = f"[{row.hub_id}](https://huggingface.co/datasets/{row.hub_id})" if row.hub_id else "none"
    details = (f"configuration {row.config}" * bool(row.config), "one commit" * bool(row.revision), "gated" * row.gated)
    listed = f" List: <{row.list_url}>" if row.list_url else ""
    return (
        row.name,
        row.title,
        ", ".join([hub, *filter(None, details)]),
        f"{row.image_column or 'by type'}, {row.label_column or 'none'}" if row.hub_id else "",
        f"{row.train_split} / {row.test_split}",
        f"{row.num_classes:,}",
        row.metric,
        row.evidence,
        f"{row.note}{listed}",
    )


def _rows(lines: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


if __name__ == "__main__":
    print(catalog_text(), end="")
