import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    """Keep what `load_dataset` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def photo_folder() -> Path:
    """The real photographs: imagenette at 160 px, as parquet files."""
    root = os.environ.get("E2MC_TEST_DATA")
    if root is None:
        pytest.skip("E2MC_TEST_DATA is not set: no folder with real photographs (imagenette160)")
    return Path(root) / "imagenette160"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A folder a class, below train/ and validation/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("validation", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pets"
