"""Every objective with every backbone family and every regularizer: two steps, everything moves, nothing is lost."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import TIMM, TRANSFORMERS, timm_folder, transformers_model
from torch import Tensor

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.registry import OBJECTIVES
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.registry import REGULARIZERS, build_regularizer

SMALL_HEADS: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dim": 16},
    "swav": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12, "freeze_prototypes_epochs": 0.0},
    "simsiam": {"projector_dim": 16, "predictor_dim": 8},
    "mec": {"projector_dim": 16, "predictor_dim": 8},
    "simclr": {"projector_dim": 16, "hidden_dim": 16},
    "barlow_twins": {"projector_dim": 16},
    "byol": {"projector_dim": 16, "hidden_dim": 16},
    "dino": {
        "projector_dim": 16,
        "hidden_dim": 16,
        "num_prototypes": 12,
        "freeze_prototypes_epochs": 0.0,
        "norm": True,
    },
}
NOT_FOR_TRAINING = {"swin"}  # transformers' breaks after a view of another size, and is refused
FAMILIES = sorted({*TIMM, *TRANSFORMERS} - NOT_FOR_TRAINING)
BATCH, SIZE, OTHER_SIZE = 8, 32, 48


def backbone_of(family: str, folder: Path) -> Backbone:
    if family in TIMM:
        timm_folder(folder, family)
    else:
        transformers_model(family).save_pretrained(folder)
    return load_backbone(str(folder), image_size=SIZE, other_sizes=[OTHER_SIZE])


def new_model(objective: str, backbone: Backbone) -> SSLModel:
    torch.manual_seed(0)
    model = SSLModel.from_backbone(backbone, objective, SMALL_HEADS[objective], image_size=SIZE)
    model.backbone.freeze_unused_parameters(SIZE)
    return model


def views_of(objective: str) -> list[Tensor]:
    sizes = [SIZE, SIZE] + [OTHER_SIZE] * (2 if OBJECTIVES[objective].takes_small_views else 0)
    return [torch.randn(BATCH, 3, size, size) for size in sizes]


def train_two_steps(model: SSLModel, regularizer: Any) -> list[float]:
    """As the Trainer does it, without its costs."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(2):
        progress = Progress(step, 2, 2)
        model.set_progress(progress)
        output = model(views_of(model.config.objective))
        loss = output.loss
        if regularizer is not None:
            regularizer.set_progress(progress)
            loss = loss + regularizer(output.embeddings).loss
        optimizer.zero_grad()
        loss.backward()
        model.before_optimizer_step()
        optimizer.step()
        model.update_teacher()
        losses.append(loss.item())
    return losses


def assert_trains_and_survives_saving(model: SSLModel, folder: Path, regularizer: Any = None) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert all(math.isfinite(loss) for loss in train_two_steps(model, regularizer))
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if model.teacher is not None:
        moved = [name for name, p in model.teacher.named_parameters() if not torch.equal(p, before[f"teacher.{name}"])]
        assert moved
    model.save_pretrained(folder)
    again = SSLModel.from_pretrained(folder)
    again.set_progress(Progress(1, 2, 2))  # schedules count from the start of a run
    model.eval()
    again.eval()
    views = views_of(model.config.objective)
    with torch.no_grad():
        torch.manual_seed(1)  # a masked autoencoder shuffles its patches
        expected = model(views)
        torch.manual_seed(1)
        found = again(views)
    # Rounding depends on how the weights lie in memory, and a loaded file lies otherwise than a trained model.
    assert torch.allclose(found.embeddings, expected.embeddings, rtol=1e-4, atol=1e-5)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4, abs=1e-5)
    own, theirs = model.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_objective_trains_on_the_backbone_family(tmp_path: Path, objective: str, family: str) -> None:
    model = new_model(objective, backbone_of(family, tmp_path / "encoder"))
    assert_trains_and_survives_saving(model, tmp_path / "run")


@pytest.mark.parametrize("regularizer", sorted(REGULARIZERS))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_objective_trains_with_the_regularizer(tmp_path: Path, objective: str, regularizer: str) -> None:
    model = new_model(objective, Backbone(transformers_model("resnet"), ImageSettings(size=SIZE)))
    criterion = build_regularizer(regularizer, {})
    assert_trains_and_survives_saving(model, tmp_path / "run", criterion)
