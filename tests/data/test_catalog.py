from pathlib import Path

import pytest

import e2mc_hf
from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.catalog import catalog_text, fill_in, find_entry
from e2mc_hf.data.paper_datasets import CATALOG
from e2mc_hf.errors import UsageError

DOCUMENT = Path(e2mc_hf.__file__).parent / "DATASETS.md"
OF_THE_PAPERS = [
    *("imagenet-1k", "imagenet-1k-1-percent", "imagenet-1k-10-percent", "inat18", "places205", "voc07", "food-101"),
    *("cifar-10", "cifar-100", "sun397", "cars", "aircraft", "dtd", "pets", "caltech-101", "flowers", "eurosat"),
    *("imagenette", "tiny-imagenet"),
]
ON_THE_HUB = [row for row in CATALOG if row.hub_id]
OWN_TABLES = [row for row in ON_THE_HUB if not row.list_url]


def test_the_table_of_datasets_is_what_the_code_says():
    assert DOCUMENT.read_text() == catalog_text(), "run: python -m e2mc_hf.data.catalog > e2mc_hf/DATASETS.md"


def test_every_dataset_of_the_papers_is_there_once():
    assert [row.name for row in CATALOG] == OF_THE_PAPERS
    assert all(DOCUMENT.read_text().count(f"| {name} |") == 1 for name in OF_THE_PAPERS)


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)
def test_a_dataset_without_id_says_where_to_get_it_and_one_with_it_where_it_was_seen(row):
    assert row.confirmed == (row.hub_id is not None)
    assert row.confirmed or "https://" in row.note or "http://" in row.note
    assert row.metric in ("accuracy", "mean per class", "mAP")
    assert row.num_classes >= 10


@pytest.mark.parametrize("row", OWN_TABLES, ids=lambda row: row.name)
@pytest.mark.parametrize("spelled", [str.lower, str.upper, lambda name: name.replace("-", "_")])
def test_a_name_of_the_catalog_fills_in_id_columns_and_configuration(row, spelled):
    filled = fill_in(DataArguments(dataset=spelled(row.name)))
    assert (filled.dataset, filled.dataset_config, filled.dataset_revision) == (row.hub_id, row.config, row.revision)
    assert (filled.image_column, filled.label_column) == (row.image_column, row.label_column)
    assert fill_in(filled) == filled


@pytest.mark.parametrize("row", ON_THE_HUB, ids=lambda row: row.name)
def test_the_hub_id_stands_for_the_whole_dataset(row):
    found = find_entry(row.hub_id.upper())
    assert (found.hub_id, found.list_url) == (row.hub_id, None)


def test_what_the_user_says_wins():
    given = DataArguments(
        dataset="cifar-100",
        dataset_config="other",
        dataset_revision="v1",
        image_column="picture",
        label_column="coarse_label",
        max_samples=7,
    )
    filled = fill_in(given)
    assert filled.dataset == "uoft-cs/cifar100"
    assert (filled.dataset_config, filled.dataset_revision) == ("other", "v1")
    assert (filled.image_column, filled.label_column, filled.max_samples) == ("picture", "coarse_label", 7)


@pytest.mark.parametrize("dataset", ["digits", "nobody/nothing", "/nowhere/cifar-10"])
def test_a_dataset_that_is_not_in_the_catalog_is_left_alone(dataset):
    assert find_entry(dataset) is None
    assert fill_in(DataArguments(dataset=dataset)) == DataArguments(dataset=dataset)


def test_a_hub_id_that_differs_by_a_hyphen_is_another_dataset():
    assert find_entry("tanganke/stanford_cars").name == "cars"
    assert find_entry("tanganke/stanford-cars") is None


def test_a_folder_of_the_same_name_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "cifar-100").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fill_in(DataArguments(dataset="cifar-100")).dataset == "cifar-100"


@pytest.mark.parametrize("name", ["inat18", "places205"])
def test_a_dataset_without_a_copy_to_trust_is_refused_with_where_to_get_it(name):
    with pytest.raises(UsageError, match=rf"`dataset` must be a folder or a Hub id .* got '{name}'\. .*http"):
        fill_in(DataArguments(dataset=name))


@pytest.mark.parametrize("share", ["1", "10"])
def test_a_share_of_imagenet_needs_its_list_of_files(share):
    name = f"imagenet-1k-{share}-percent"
    with pytest.raises(UsageError, match=rf"`file_list` .* Download https://\S+/{share}percent\.txt and pass it"):
        fill_in(DataArguments(dataset=name))
    assert fill_in(DataArguments(dataset=name, file_list="list.txt")).dataset == "ILSVRC/imagenet-1k"
