import pytest
from datasets import ClassLabel, Features, Image, Value

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
