import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

settings.register_profile("e2mc", max_examples=500, deadline=None, derandomize=True)
settings.load_profile("e2mc")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images; see E2MC_TEST_DATA in .ci/run."""
    folder = os.environ.get("E2MC_TEST_DATA")
    if not folder:
        pytest.skip("E2MC_TEST_DATA is not set: no real images here")
    return Path(folder)


@pytest.fixture(scope="session")
def golden(test_data: Path) -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Values of the authors' released functions on stored inputs, by case: scalars and arrays."""
    folder = test_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip("no golden values beside E2MC_TEST_DATA")

    def read(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return json.loads((folder / "values.json").read_text())[case], load_file(folder / f"{case}.safetensors")

    return read


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard() -> None:
    """Tests that start in the background of a shell begin with SIGINT ignored, and a run then leaves it so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
