import pickle

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.sources import ImageSource, load_images, load_test_images
from e2mc_hf.errors import UsageError


def source_of(labels, feature, images=None):
    images = images or [{"bytes": b"broken", "path": None}] * len(labels)
    dataset = Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": feature})
    )
    return ImageSource(dataset, "image", "label", "tiny", None)


def test_digits_are_the_embedded_default():
    source = load_images(DataArguments(), "train")
    assert (len(source), source.declared_classes, source.name, source.revision) == (1347, 10, "digits", None)
    assert (source.image(0).mode, source.image(0).size) == ("RGB", (8, 8))


def test_an_image_folder_loads_with_its_classes_and_splits(image_folder):
    source = load_images(DataArguments(dataset=str(image_folder)), "train")
    assert (len(source), source.declared_classes, source.name) == (6, 2, "pets")
    assert source.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert source.image(5).size == (10, 12)


def test_a_folder_of_classes_without_splits_is_all_train(image_folder):
    source = load_images(DataArguments(dataset=str(image_folder / "validation")), "train")
    assert (len(source), source.labels().dtype) == (4, np.int64)


def test_a_parquet_folder_of_photographs_loads_and_its_gray_ones_come_out_rgb(photo_folder):
    source = load_images(DataArguments(dataset=str(photo_folder)), "validation")
    assert (len(source), source.declared_classes, source.name) == (3925, 10, "imagenette160")
    gray = [index for index in range(600) if source.dataset[index]["image"].mode == "L"]
    assert gray
    assert {source.image(index).mode for index in gray} == {"RGB"}


def test_the_test_split_is_test_or_validation_whichever_is_there(image_folder):
    assert len(load_test_images(DataArguments(), None)) == 450
    assert len(load_test_images(DataArguments(dataset=str(image_folder)), None)) == 4
    assert len(load_test_images(DataArguments(dataset=str(image_folder)), "train")) == 6


def test_without_test_and_validation_the_test_split_must_be_given(image_folder):
    with pytest.raises(UsageError, match=r"`test_split` must be given .* got splits train in"):
        load_test_images(DataArguments(dataset=str(image_folder / "train")), None)


def test_an_unknown_split_is_refused_with_the_splits_listed():
    with pytest.raises(UsageError, match=r"\(train, test\), got 'validation'"):
        load_images(DataArguments(), "validation")


def test_max_samples_takes_the_first_of_one_shuffle():
    few, many = (load_images(DataArguments(max_samples=count), "train") for count in (20, 50))
    assert (len(few), len(many)) == (20, 50)
    assert few.labels().tolist() == many.labels()[:20].tolist()
    assert few.labels().tolist() != load_images(DataArguments(), "train").labels()[:20].tolist()


def test_more_max_samples_than_images_takes_them_all():
    assert len(load_images(DataArguments(max_samples=10**6), "test")) == 450


def test_labels_are_read_without_decoding_images():
    assert source_of([1, 0], ClassLabel(names=["a", "b"])).labels().tolist() == [1, 0]


def test_plain_integers_declare_no_number_of_classes():
    source = source_of([4, 0], Value("int64"))
    assert (source.declared_classes, source.labels().tolist()) == (None, [4, 0])


@pytest.mark.parametrize("missing", [None, -1])
def test_an_image_without_label_is_refused(missing):
    with pytest.raises(UsageError, match=r"`label_column` .* got 1 of 2 without in column 'label' of 'tiny'"):
        source_of([missing, 1], Value("int64")).labels()


def test_labels_of_a_source_without_label_column_are_refused():
    source = ImageSource(source_of([0], Value("int64")).dataset, "image", None, "tiny", None)
    with pytest.raises(UsageError, match=r"`label_column` must name the labels: 'tiny' .*label \(int64\)"):
        source.labels()


def test_a_broken_image_is_named_with_source_index_and_cause():
    source = source_of([0, 1], Value("int64"))
    with pytest.raises(UsageError, match=r"image 1 of 'tiny' \(UnidentifiedImageError: .*\)\. Repair") as caught:
        source.image(1)
    assert "\n" not in str(caught.value)


def test_a_missing_image_is_named(tmp_path):
    source = source_of([0], Value("int64"), images=[None])
    with pytest.raises(UsageError, match="image 0 of 'tiny'"):
        source.image(0)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="which holds none"):
        load_images(DataArguments(dataset=str(tmp_path)), "train")


def test_a_broken_parquet_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match=r"`dataset` must be a readable folder .*Parquet") as caught:
        load_images(DataArguments(dataset=str(tmp_path)), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["/nowhere/at/all", "nobody/nothing"])
def test_a_dataset_that_is_nowhere_is_refused_in_one_line(dataset):
    with pytest.raises(UsageError, match=rf"`dataset` must be `digits`, .* got '{dataset}'") as caught:
        load_images(DataArguments(dataset=dataset), "train")
    assert "\n" not in str(caught.value)


def test_a_revision_of_something_not_on_the_hub_warns():
    with pytest.warns(UserWarning, match="`dataset_revision` has no effect on 'digits'"):
        load_images(DataArguments(dataset_revision="main"), "train")


def test_a_source_travels_to_workers(image_folder):
    source = load_images(DataArguments(dataset=str(image_folder)), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image(3).tobytes() == source.image(3).tobytes()


def test_an_image_without_bytes_or_whose_file_is_gone_has_none(tmp_path):
    rows = [None, {"bytes": None, "path": str(tmp_path / "gone.png")}, {"bytes": b"", "path": None}]
    source = source_of([0, 1, 2], Value("int64"), images=rows)
    assert [source.encoded(index) for index in range(3)] == [None, None, b""]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/zero", "."])
def test_a_path_that_no_file_can_have_is_a_missing_image(path):
    assert source_of([0], Value("int64"), images=[{"bytes": None, "path": path}]).encoded(0) is None


def test_bytes_are_read_without_decoding_whatever_the_format_of_the_rows():
    source = source_of([0, 1], Value("int64"))
    source = ImageSource(source.dataset.with_format("numpy"), "image", "label", "tiny", None)
    assert source.encoded(1) == b"broken"
    assert source.labels().tolist() == [0, 1]
