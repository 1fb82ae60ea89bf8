import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from e2mc_hf.evaluation.features import Features


class DigitImages(Dataset):
    """Handwritten digits as (3, 8, 8) images in [0, 1]."""

    def __init__(self, start, stop):
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels[start:stop] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.images, self.labels = images.expand(-1, 3, -1, -1), labels[start:stop]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


@pytest.fixture(scope="session")
def digit_images():
    return DigitImages(0, 1000), DigitImages(1000, 1797)


@pytest.fixture(scope="session")
def digit_features():
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels.astype(np.float32), labels.astype(np.int64)
    return Features(pixels[:1000], labels[:1000]), Features(pixels[1000:], labels[1000:])
