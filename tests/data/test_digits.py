import numpy as np
from datasets import ClassLabel, Image

from e2mc_hf.data.digits import digits_splits


def test_all_1797_scans_are_split_1347_to_450():
    assert {name: len(split) for name, split in digits_splits().items()} == {"train": 1347, "test": 450}


def test_both_splits_hold_every_digit_in_the_same_share():
    splits = digits_splits()
    shares = [np.bincount(splits[name]["label"], minlength=10) / len(splits[name]) for name in ("train", "test")]
    assert np.abs(shares[0] - shares[1]).max() < 0.002


def test_the_split_is_the_same_every_time():
    assert digits_splits()["train"]["label"][:10] == [7, 3, 6, 6, 7, 6, 7, 9, 2, 9]
    assert digits_splits()["test"]["label"][:10] == [2, 0, 4, 9, 4, 1, 2, 4, 6, 7]


def test_columns_are_typed_and_nothing_is_written():
    train = digits_splits()["train"]
    assert isinstance(train.features["image"], Image)
    assert isinstance(train.features["label"], ClassLabel)
    assert train.cache_files == []


def test_gray_levels_span_0_to_255():
    pixels = np.stack([np.asarray(image) for image in digits_splits()["test"]["image"]])
    assert pixels.shape == (450, 8, 8)
    assert np.array_equal(np.unique(pixels), np.rint(np.arange(17) * 255 / 16))
