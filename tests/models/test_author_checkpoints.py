import json
import re

import numpy as np
import pytest
import torch
from models.conv4 import cifar_resnet_backbone, conv4_backbone, features_of
from PIL import Image

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.sources import load_images
from e2mc_hf.evaluation.features import Features
from e2mc_hf.evaluation.knn import knn_predict
from e2mc_hf.models.checkpoint_import import import_checkpoint

FILES = {
    "proto_cub_conv4_euclidean_1supp_3query_50bs_best.pth.tar",
    "proto_miniimagenet_conv4_euclidean_1supp_1query_50bs_best.pth.tar",
    "proto_miniimagenet_conv4_euclidean_1supp_3query_50bs_1images_best.pth.tar",
    "proto_miniimagenet_conv4_euclidean_1supp_3query_50bs_600images_best.pth.tar",
    "proto_miniimagenet_conv4_euclidean_1supp_3query_50bs_best.pth.tar",
    "proto_omniglot_conv4_euclidean_1supp_3query_50bs_best.pth.tar",
    "random_init_conv4.pth.tar",
    "resnet20-12fca82f.th",
    "resnet32-d509ac18.th",
    "resnet56-4bfd9763.th",
    "umtra_miniimagenet_conv4_euclidean_1supp_1query_5bs_best.pth.tar",
}
TOLERANCE = 0.1  # points


@pytest.fixture(scope="session")
def checkpoints(test_data):
    folder = test_data / "checkpoints"
    if not folder.is_dir():
        pytest.skip("no checkpoints in E2MC_TEST_DATA")
    return folder


def empty_backbone(name):
    if match := re.match(r"resnet(\d+)-", name):
        return cifar_resnet_backbone((int(match[1]) - 2) // 6)
    return conv4_backbone(num_channels=1 if "omniglot" in name else 3)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_real_file_of_its_authors_loads_whole_and_its_record_is_that_of_the_download(checkpoints, name):
    imported = import_checkpoint(checkpoints / "original" / name, backbone=empty_backbone(name))
    known = json.loads((checkpoints / "PROVENANCE.json").read_text())[name]
    record = imported.record
    assert (record.file.name, record.file.size, record.file.sha256) == (name, known["size"], known["sha256"])
    assert record.file.container == "torch legacy"
    assert (record.format, imported.model) == ("encoder", None)
    assert record.coverage > 0.9999
    # The counters of batch normalization are younger than the ResNets.
    assert all(key.endswith("num_batches_tracked") for key in record.missing)
    assert bool(record.missing) == name.startswith("resnet")
    classifier = ["linear.weight", "linear.bias"] if name.startswith("resnet") else []
    assert sorted(record.dropped) == sorted(classifier)
    stored = sum(tensor.numel() for tensor in imported.backbone.parameters())
    assert stored == known["n_params"] - (650 if classifier else 0)
    assert str(checkpoints) not in json.dumps(vars(record), default=vars)


def test_no_file_of_the_folder_is_left_out(checkpoints):
    assert {path.name for path in (checkpoints / "original").iterdir()} == FILES


@pytest.fixture(scope="session")
def imagenette(test_data):
    """Pixels at 84 and classes of every training and validation image.

    As those who measured prepared them: the resized side is rounded, the crop begins at the lower whole pixel. Our
    evaluation transform rounds the other way; the shift of one pixel moves the accuracy by up to 0.7 points.
    """
    splits = []
    for split in ("train", "validation"):
        source = load_images(DataArguments(dataset=str(test_data / "imagenette160")), split)
        pixels = [torch.from_numpy(prepared(source.image(index))) for index in range(len(source))]
        splits.append((torch.stack(pixels).permute(0, 3, 1, 2), np.asarray(source.labels())))
    return splits


def prepared(image):
    width, height = (round(side * 84 / min(image.size)) for side in image.size)
    left, top = (width - 84) // 2, (height - 84) // 2
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 84, top + 84)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in FILES if "omniglot" not in name and "resnet" not in name))
def test_nearest_neighbors_of_the_imported_encoder_are_as_good_as_those_measured_apart(checkpoints, imagenette, name):
    measured = json.loads((checkpoints / "VERIFY.json").read_text())["imagenette160_84px_frozen_eval_mode"]
    backbone = import_checkpoint(checkpoints / "original" / name, backbone=conv4_backbone()).backbone
    (train_x, train_y), (test_x, test_y) = [(features_of(backbone, x).numpy(), y) for x, y in imagenette]
    assert train_x.shape[1] == 1600
    accuracy = 100 * np.mean(knn_predict(Features(train_x, train_y), test_x) == test_y)
    print(f"{name}: {accuracy:.2f}, measured apart {measured[name.split('.')[0]]['knn20']}")
    assert abs(accuracy - measured[name.split(".")[0]]["knn20"]) <= TOLERANCE
