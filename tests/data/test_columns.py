import pytest
from datasets import ClassLabel, Features, Image, LargeList, List, Value

from e2mc_hf.data.columns import find_image_column, find_label_column
from e2mc_hf.errors import UsageError

IMAGE, CLASS, INTEGER = Image(), ClassLabel(names=["a", "b"]), Value("int64")


def test_columns_are_found_by_type_not_by_name():
    features = Features({"label": IMAGE, "image": CLASS, "text": Value("string")})
    assert find_image_column(features, None, name="x") == "label"
    assert find_label_column(features, None, name="x") == "image"


def test_a_named_column_is_taken_out_of_several():
    features = Features({"photo": IMAGE, "mask": IMAGE, "fine": CLASS, "coarse": CLASS})
    assert find_image_column(features, "mask", name="x") == "mask"
    assert find_label_column(features, "coarse", name="x") == "coarse"


@pytest.mark.parametrize("features", [{"photo": IMAGE, "mask": IMAGE}, {"text": Value("string")}])
def test_several_image_columns_or_none_are_refused_with_the_columns_listed(features):
    with pytest.raises(UsageError, match=r"`image_column` can be left out only .* got \d.* \w+ \((Image|string)\)"):
        find_image_column(Features(features), None, name="x")


def test_a_named_column_that_holds_no_images_is_refused():
    with pytest.raises(UsageError, match=r"`image_column` .* got 'label'.*photo \(Image\)"):
        find_image_column(Features({"photo": IMAGE, "label": CLASS}), "label", name="x")


def test_integers_are_labels_only_if_named():
    features = Features({"photo": IMAGE, "count": INTEGER})
    assert find_label_column(features, None, name="x") is None
    assert find_label_column(features, "count", name="x") == "count"


@pytest.mark.parametrize("named", ["photo", "nothing"])
def test_a_named_label_column_of_another_type_is_refused(named):
    with pytest.raises(UsageError, match=rf"`label_column` .* got '{named}'.*photo \(Image\)"):
        find_label_column(Features({"photo": IMAGE}), named, name="x")


def test_several_label_columns_do_not_stand_in_the_way_of_training():
    assert find_label_column(Features({"photo": IMAGE, "fine": CLASS, "coarse": CLASS}), None, name="x") is None


STORED = {"bytes": Value("binary"), "path": Value("string")}


def test_a_stored_image_that_is_not_called_one_is_found_if_no_column_is():
    features = Features({"photo": STORED, "label": CLASS, "box": {"x": INTEGER, "y": INTEGER}})
    assert find_image_column(features, None, name="x") == "photo"
    assert find_image_column(Features({"photo": STORED, "thumbnail": IMAGE}), None, name="x") == "thumbnail"
    assert find_image_column(Features({"photo": STORED, "thumbnail": IMAGE}), "photo", name="x") == "photo"


def test_plain_bytes_are_an_image_only_if_named():
    features = Features({"jpeg": Value("binary"), "large": Value("large_binary")})
    assert find_image_column(features, "large", name="x") == "large"
    with pytest.raises(UsageError, match=r"got 0\. Pass one of the columns of 'x': jpeg \(binary\)"):
        find_image_column(features, None, name="x")


@pytest.mark.parametrize("several", [List(IMAGE), LargeList(IMAGE)])
@pytest.mark.parametrize("named", [None, "frames"])
def test_a_column_of_several_images_a_row_is_refused(several, named):
    with pytest.raises(UsageError, match=r"one image a row.* got (0|'frames')\. .*frames \(list of Image\)"):
        find_image_column(Features({"frames": several, "label": CLASS}), named, name="x")


def test_the_columns_of_a_webdataset_are_found_by_their_extensions():
    features = Features({"jpg": IMAGE, "cls": INTEGER, "json": {"id": INTEGER}, "__key__": Value("string")})
    assert find_image_column(features, None, name="x") == "jpg"
    assert find_label_column(features, None, name="x") == "cls"


def test_a_column_of_classes_goes_before_one_called_cls():
    assert find_label_column(Features({"jpg": IMAGE, "cls": INTEGER, "label": CLASS}), None, name="x") == "label"
    assert find_label_column(Features({"jpg": IMAGE, "cls": Value("string")}), None, name="x") is None


@pytest.mark.parametrize("name", ["img", "pixel_values", "jpg", "fine_label"])
def test_the_name_of_the_image_column_does_not_matter(name):
    assert find_image_column(Features({"text": Value("string"), name: IMAGE}), None, name="x") == name
