import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import TIMM
from torch import Tensor, nn

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.trainer import E2MCTrainer


class Watched(E2MCRegularizer):
    """E2MC that keeps what it was given and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, embeddings: Tensor) -> Any:
        output = super().forward(embeddings)
        self.calls.append((embeddings.detach(), output.loss.detach()))
        return output


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224"])
def test_under_bfloat16_three_steps_are_finite_and_the_criterion_is_that_of_float32(
    tmp_path: Path, encoder: str
) -> None:
    torch.manual_seed(0)
    backbone = load_backbone(encoder, from_scratch=True, backbone_args=TIMM[encoder], image_size=32)
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 32}, image_size=32)
    kinds = set()
    for layer in model.backbone.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    arguments = E2MCTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=16,
        optimizer="adamw",
        learning_rate=1e-3,
        logging_steps=1,
    )
    source = load_images(DataArguments(max_samples=48), "train")
    dataset = ViewDataset(source, ViewTransform(ViewArguments(image_size=32), backbone.image_settings), seed=0)
    regularizer = Watched()
    run = E2MCTrainer(model, arguments, dataset, regularizer=regularizer)
    run.train()
    assert kinds == {torch.bfloat16}
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == len(regularizer.calls) == 3
    assert all(math.isfinite(entry[name]) for entry in logged for name in ("loss", "grad_norm"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for embeddings, loss in regularizer.calls:
        exact = E2MCRegularizer()(embeddings.double()).loss
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("by_environment", [False, True])
def test_float16_on_the_cpu_is_refused_with_what_works_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    if by_environment:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    options = {} if by_environment else {"fp16": True}
    with pytest.raises(UsageError, match=r"`fp16` needs a GPU, got 'cpu'. Pass --bf16 on the CPU."):
        E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
