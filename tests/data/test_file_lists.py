import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data.file_lists import find_listed, read_file_list, stored_names
from e2mc_hf.errors import UsageError

IMAGENET = ["n01440764_10026.JPEG", "n01440764_10027.JPEG", "n02102040_7.JPEG"]
ON_THE_HUB = ["n01440764_10026_n01440764.JPEG", "n01440764_10027_n01440764.JPEG", "n02102040_7_n02102040.JPEG"]


def test_a_list_is_one_name_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n\n  cat/b.png \r\n", encoding="utf-8")
    assert read_file_list(str(tmp_path / "list.txt")) == ["a.png", "cat/b.png"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_list_without_names_or_of_bytes_is_refused(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"`file_list` must .*list\.txt"):
        read_file_list(str(path))


def test_a_list_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=r"`file_list` must be a text file .*FileNotFoundError"):
        read_file_list("/nowhere/list.txt")


def test_the_published_names_of_imagenet_are_found_under_the_names_on_the_hub():
    assert find_listed([IMAGENET[2], IMAGENET[0]], ON_THE_HUB, source="x") == [0, 2]
    assert find_listed([f"n02102040/{IMAGENET[2]}"], ON_THE_HUB, source="x") == [2]
    assert find_listed(ON_THE_HUB[1:2], IMAGENET, source="x") == [1]


def test_the_published_names_of_imagenet_are_found_in_its_folders():
    paths = [f"/data/train/{name.split('_')[0]}/{name}" for name in IMAGENET]
    assert find_listed(IMAGENET[1:], paths, source="x") == [1, 2]


def test_another_name_with_underscores_is_left_as_it_is():
    stored = ["n01440764_10026_n02102040.JPEG", "cat_1_cat.png"]
    assert find_listed(["cat_1_cat.png"], stored, source="x") == [1]
    with pytest.raises(UsageError, match="names that are not there"):
        find_listed(["cat_1.png"], stored, source="x")


def test_a_name_of_several_images_needs_its_folder():
    stored = ["pets/cat/0.png", "pets/dog/0.png", "pets/dog/1.png", None]
    assert find_listed(["dog/0.png", "1.png"], stored, source="x") == [1, 2]
    with pytest.raises(UsageError, match=r"got '0\.png', which 2 images of 'x' are called\. Write its folder"):
        find_listed(["0.png"], stored, source="x")


def test_a_name_that_is_not_there_is_refused_with_an_example_of_both():
    with pytest.raises(UsageError, match=r"got 1 of 2 names .* such as 'c\.png'; .* such as 'a\.png'\. Check"):
        find_listed(["a.png", "c.png"], ["a.png", "b.png"], source="x")


@pytest.mark.parametrize("stored", [[], [None, None], ["", None]])
def test_a_dataset_without_file_names_is_refused(stored):
    with pytest.raises(UsageError, match="must be left out for a dataset that stores no file names, got 'x'"):
        find_listed(["a.png"], stored, source="x")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), unique=True, min_size=1), st.data())
@settings(max_examples=150)
def test_whatever_is_listed_is_found_once_in_the_order_of_the_dataset(pairs, data):
    stored = [f"/stored/{folder}/{number}.png" for folder, number in pairs]
    picked = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1))
    listed = [stored[index].removeprefix("/stored/") for index in picked]
    assert find_listed(listed, stored, source="x") == sorted(set(picked))


def test_names_are_read_without_decoding_an_image():
    rows = [{"bytes": b"broken", "path": "a.png"}, {"bytes": b"broken", "path": None}, None]
    features = Features({"image": Image(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": rows, "label": [0, 1, 2]}, features=features)
    assert stored_names(dataset, "image") == ["a.png", None, None]
