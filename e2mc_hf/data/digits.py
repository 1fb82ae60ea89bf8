"""The embedded default: 1,797 scanned digits that come with scikit-learn, so that everything runs offline at once."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0
TEST_SHARE = 0.25
GRAY_LEVELS = 16


def digits_splits() -> dict[str, Dataset]:
    """Build the splits `train` (1,347 scans) and `test` (450), in memory.

    The 8x8 scans have 17 gray levels, 0..16, mapped to 0..255; ink is white. The split is one stratified 75/25 draw
    (scikit-learn's `train_test_split`, seed 0) over all writers: unlike the original partition, both splits hold
    digits of the same writers.

    Returns:
        Split name to a dataset with the columns `image` and `label`.

    Reference:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, https://doi.org/10.24432/C50P49
        (its test set, which is what scikit-learn ships).
    """
    scans, labels = load_digits(return_X_y=True)
    grays = np.rint(scans.reshape(-1, 8, 8) * (255 / GRAY_LEVELS)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    return {"train": _dataset(grays[train], labels[train]), "test": _dataset(grays[test], labels[test])}


def _dataset(grays: np.ndarray, labels: np.ndarray) -> Dataset:
    """Make a dataset of gray images and their labels, nothing written to disk."""
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    images = [PillowImage.fromarray(gray) for gray in grays]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
