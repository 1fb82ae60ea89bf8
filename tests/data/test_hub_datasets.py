"""Datasets on the Hub, served by a stand-in: ids, commits, the catalog, and what a user reads who may not have them."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from data.hub_stand_in import COMMIT, EARLIER_COMMIT, HubStandIn
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

ROOT = Path(__file__).parents[2]
DENIALS = {
    "gated/anonymous": (401, "GatedRepo"),
    "gated/refused": (403, "GatedRepo"),
    "gated/plain": (403, None),
    "private/or-missing": (401, "RepoNotFound"),
}
CASES = {
    "catalog": ({"dataset": "CIFAR100"}, "train", False),
    "stream": ({"dataset": "CIFAR100", "streaming": True}, "train", False),
    "revision": ({"dataset": "CIFAR100", "dataset_revision": "v1"}, "train", False),
    "stream of a revision": ({"dataset": "CIFAR100", "dataset_revision": "v1", "streaming": True}, "train", False),
    "given label": ({"dataset": "uoft-cs/cifar100", "label_column": "coarse_label"}, None, True),
    "other classes": ({"dataset": "tiny-imagenet"}, None, True),
    "script": ({"dataset": "someone/script"}, "train", False),
    "gated file": (
        {"dataset": "parquet", "data_files": "hf://datasets/gated/refused/a.parquet", "streaming": True},
        "train",
        False,
    ),
} | {
    f"{name} {streaming}": ({"dataset": name, "streaming": streaming}, "train", False)
    for name in DENIALS
    for streaming in (False, True)
}


def parquet(seed: int, count: int, image: str, labels: dict[str, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    columns = {image: [PillowImage.fromarray(one) for one in pixels]} | {name: list(range(count)) for name in labels}
    features = {image: Image()} | {name: ClassLabel(num_classes=classes) for name, classes in labels.items()}
    buffer = io.BytesIO()
    Dataset.from_dict(columns, features=Features(features)).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of the stand-in, and the paths asked for."""
    cifar, tiny = ("img", {"fine_label": 100, "coarse_label": 20}), ("image", {"label": 9})
    HubStandIn.denials, HubStandIn.requests = DENIALS, []
    HubStandIn.files = {
        "uoft-cs/cifar100": {
            "data/train-00000-of-00002.parquet": parquet(0, 5, *cifar),
            "data/train-00001-of-00002.parquet": parquet(1, 4, *cifar),
            "data/test-00000-of-00001.parquet": parquet(2, 3, *cifar),
        },
        "zh-plus/tiny-imagenet": {
            "data/train-00000-of-00001.parquet": parquet(3, 4, *tiny),
            "data/valid-00000-of-00001.parquet": parquet(4, 2, *tiny),
        },
        "someone/script": {"script.py": b"import datasets"},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStandIn)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", HubStandIn.requests
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def loaded(hub, tmp_path_factory):
    """What a fresh process gets from the stand-in in each case."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path_factory.mktemp("hub")), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("hub_client.py")), json.dumps(list(CASES.values()))]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return dict(zip(CASES, json.loads(answer.stdout), strict=True))


def test_a_name_of_the_catalog_loads_its_hub_id_at_one_commit(loaded):
    result = loaded["catalog"]
    assert "error" not in result, result
    assert (result["name"], result["revision"], result["warnings"]) == ("uoft-cs/cifar100", COMMIT, [])
    assert (result["image_column"], result["label_column"], len(result["images"])) == ("img", "fine_label", 9)


def test_a_stream_from_the_hub_has_the_same_images_of_the_same_commit(loaded, hub):
    result = loaded["stream"]
    assert "error" not in result, result
    assert result["images"] == loaded["catalog"]["images"]
    assert (result["name"], result["revision"], result["image_column"]) == ("uoft-cs/cifar100", COMMIT, "img")
    assert not any("/resolve/main/data" in path for path in hub[1])


@pytest.mark.parametrize("case", ["revision", "stream of a revision"])
def test_a_revision_is_that_of_the_files(loaded, hub, case):
    assert "error" not in loaded[case], loaded[case]
    assert loaded[case]["revision"] == EARLIER_COMMIT
    assert loaded[case]["images"] == loaded["catalog"]["images"]
    for file in ("train-00000-of-00002", "train-00001-of-00002"):
        assert f"/datasets/uoft-cs/cifar100/resolve/{EARLIER_COMMIT}/data/{file}.parquet" in hub[1]


def test_the_test_split_is_that_of_the_catalog_and_the_label_the_users(loaded):
    assert (loaded["given label"]["split"], loaded["given label"]["label_column"]) == ("test", "coarse_label")
    assert loaded["other classes"]["split"] == "valid"


def test_another_number_of_classes_than_the_papers_is_said(loaded):
    (warning,) = loaded["other classes"]["warnings"]
    assert "'zh-plus/tiny-imagenet' has 9 classes in column 'label', the papers' Tiny ImageNet has 200" in warning
    assert loaded["given label"]["warnings"] == []


def test_a_dataset_that_is_a_script_points_to_the_converted_copy(loaded):
    assert "refs/convert/parquet" in loaded["script"]["message"]


@pytest.mark.parametrize("name", ["gated/anonymous", "gated/refused", "gated/plain"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_gated_dataset_names_its_page_and_the_token(loaded, name, streaming):
    result = loaded[f"{name} {streaming}"]
    assert result["error"] == "UsageError"
    assert f"got '{name}', which" in result["message"]
    assert f"https://huggingface.co/datasets/{name}" in result["message"]
    assert "HF_TOKEN" in result["message"]
    assert "\n" not in result["message"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_is_private_or_not_there_is_not_called_gated(loaded, streaming):
    message = loaded[f"private/or-missing {streaming}"]["message"]
    assert "Check the name" in message
    assert "gated" not in message


def test_a_file_of_a_gated_dataset_is_refused_with_the_token(loaded):
    assert "HF_TOKEN" in loaded["gated file"]["message"]


def test_what_may_not_be_read_is_asked_for_once(loaded, hub):
    asked = [path for path in hub[1] if "gated/anonymous" in path]
    assert asked == ["/datasets/gated/anonymous/resolve/main/README.md"] * 2  # map-style and as a stream
