"""Small models and runs, and what spoils them at one step: an image, the loss, a gradient, the teacher."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.trainer import E2MCTrainer

BATCH = 16
SMALL: dict[str, dict[str, int]] = {
    "barlow_twins": {"projector_dim": 16},
    "byol": {"projector_dim": 16, "hidden_dim": 16},
    "dino": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12},
    "mec": {"projector_dim": 16, "predictor_dim": 8},
    "simclr": {"projector_dim": 16, "hidden_dim": 16},
    "simsiam": {"projector_dim": 16, "predictor_dim": 8},
    "swav": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12, "queue_length": 32},
    "vicreg": {"projector_dim": 16},
}
FIRST_WEIGHT = "backbone.model.timm_model.conv1.0.weight"


def new_model(objective: str = "byol", **options: int) -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    return SSLModel.from_backbone(backbone, objective, SMALL[objective] | options, image_size=32)


def digits(model: SSLModel) -> ViewDataset:
    views = ViewArguments(image_size=32, flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=[0.0])
    source = load_images(DataArguments(max_samples=64), "train")
    return ViewDataset(source, ViewTransform(views, model.backbone.image_settings), seed=0)


def arguments(folder: Path, **options: Any) -> E2MCTrainingArguments:
    given: dict[str, Any] = {"regularizer_args": {"entropy_weight": 1.0, "covariance_weight": 1.0}}
    given |= {
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "max_steps": 5,
        "learning_rate": 0.01,
        "optimizer": "sgd",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return E2MCTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **given | options)


def trainer(folder: Path, model: SSLModel, kind: type[E2MCTrainer] = E2MCTrainer, **options: Any) -> E2MCTrainer:
    return kind(model, arguments(folder, **options), digits(model))


class Fault:
    """Spoils a model at one of its forward passes in training, and remembers the weights it had then."""

    def __init__(self, model: SSLModel, kind: str, step: int) -> None:
        self.model, self.step, self.count = model, step, 0
        self.before: dict[str, Tensor] = {}
        before, after = getattr(self, kind, None), getattr(self, f"{kind}_after", None)
        model.register_forward_pre_hook(lambda _, args, kwargs: self._at_step(before, kwargs), with_kwargs=True)
        model.register_forward_hook(lambda _, args, output: after(output) if self.is_due and after else None)

    @property
    def is_due(self) -> bool:
        return self.model.training and self.count == self.step

    def _at_step(self, action: Callable[[dict[str, Any]], None] | None, inputs: dict[str, Any]) -> None:
        self.count += self.model.training
        if self.is_due:
            self.before = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
            if action is not None:
                action(inputs)

    def image(self, inputs: dict[str, Any]) -> None:
        inputs["views"][0][3, 1, 5, 5] = math.nan

    def teacher(self, inputs: dict[str, Any]) -> None:
        next(self.model.teacher.parameters()).data[0] = math.inf

    def gradient(self, inputs: dict[str, Any]) -> None:
        self._change_gradient(self.model.get_parameter(FIRST_WEIGHT), lambda gradient: gradient[0].fill_(math.nan))

    def huge_gradients(self, inputs: dict[str, Any]) -> None:
        for weight in self.model.parameters():
            if weight.requires_grad:
                self._change_gradient(weight, lambda gradient: gradient.fill_(5e18 / math.sqrt(gradient.numel())))

    def _change_gradient(self, weight: nn.Parameter, change: Callable[[Tensor], Any]) -> None:
        def once(parameter: Tensor) -> None:
            change(parameter.grad)
            handle.remove()

        handle = weight.register_post_accumulate_grad_hook(once)

    def loss_after(self, output: Any) -> None:
        output.loss = output.loss + math.nan

    def column_after(self, output: Any) -> None:
        output.embeddings = torch.where(torch.arange(16) == 5, math.nan, output.embeddings)
