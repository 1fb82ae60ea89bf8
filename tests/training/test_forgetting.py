"""A good encoder without heads: continued at once it forgets, with its new heads fitted first it does not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import EvaluationDataset, ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform, evaluation_transform
from e2mc_hf.evaluation.features import extract_features
from e2mc_hf.evaluation.knn import knn_predict
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.head_warmup import warm_up_heads
from e2mc_hf.training.trainer import E2MCTrainer

SIZE = 16
VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": SIZE, "patch_size": 4}
HEADS = {"projector_dim": 128, "hidden_dim": 128}
VIEWS: dict[str, Any] = {"crop_scale": [0.4, 1.0], "rotation_degrees": 15.0, "blur_prob": [0.0], "solarize_prob": [0.0]}
VIEWS |= {"flip_prob": 0.0, "jitter_prob": 0.0, "grayscale_prob": 0.0}


def with_new_heads(backbone: Backbone) -> SSLModel:
    torch.manual_seed(1)
    return SSLModel.from_backbone(copy.deepcopy(backbone), "simclr", HEADS, image_size=SIZE)


def arguments(folder: Path, **options: Any) -> E2MCTrainingArguments:
    fixed: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "regularizer": "none", "weight_decay": 1e-4}
    return E2MCTrainingArguments(output_dir=str(folder), per_device_train_batch_size=128, **fixed, **options)


def digits(backbone: Backbone) -> ViewDataset:
    views = ViewTransform(ViewArguments(image_size=SIZE, **VIEWS), backbone.image_settings)
    return ViewDataset(load_images(DataArguments(), "train"), views, seed=0)


def nearest_neighbor_accuracy(backbone: Backbone) -> float:
    """Accuracy in % on 450 test images."""
    transform = evaluation_transform(backbone.image_settings)
    train, test = (
        extract_features(backbone, EvaluationDataset(load_images(DataArguments(), split), transform), batch_size=256)
        for split in ("train", "test")
    )
    return 100 * float((knn_predict(train, test.x) == test.y).mean())


@pytest.fixture(scope="module")
def good_encoder(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A small vision transformer after 30 epochs of SimCLR on the digits; its heads are thrown away."""
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", from_scratch=True, image_size=SIZE, backbone_args=VIT)
    model = SSLModel.from_backbone(backbone, "simclr", HEADS, image_size=SIZE)
    untrained = nearest_neighbor_accuracy(backbone)
    schedule = {"max_steps": 300, "optimizer": "adamw", "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
    E2MCTrainer(model, arguments(tmp_path_factory.mktemp("pretraining"), **schedule), digits(backbone)).train()
    assert nearest_neighbor_accuracy(backbone) > untrained + 25
    return backbone


def accuracy_after_continuing(encoder: Backbone, folder: Path, head_warmup: str) -> float:
    model, dataset = with_new_heads(encoder), digits(encoder)
    options = {"max_steps": 60, "optimizer": "sgd", "learning_rate": 0.003, "head_warmup": head_warmup}
    run = arguments(folder, head_warmup_learning_rate=3e-3, **options)
    warm_up_heads(model, run, dataset, new_heads=True)
    E2MCTrainer(model, run, dataset).train()
    return nearest_neighbor_accuracy(model.backbone)


def test_without_fitted_heads_a_good_encoder_forgets_and_with_them_it_does_not(
    good_encoder: Backbone, tmp_path: Path
) -> None:
    before = nearest_neighbor_accuracy(good_encoder)
    at_once = accuracy_after_continuing(good_encoder, tmp_path / "at_once", "none")
    heads_first = accuracy_after_continuing(good_encoder, tmp_path / "heads_first", "auto")
    print(f"nearest neighbors: before {before:.2f}, new heads at once {at_once:.2f}, fitted first {heads_first:.2f}")
    assert at_once < before - 3
    assert heads_first > before - 1.5
