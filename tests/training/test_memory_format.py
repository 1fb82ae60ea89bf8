from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import TIMM, same_state
from safetensors.torch import load_file
from torch import Tensor, nn

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.memory_format import channels_last
from e2mc_hf.training.trainer import E2MCTrainer

SIZE, SMALL_SIZE = 32, 16
DINO = {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12}


def new_model(encoder: str = "resnet18") -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone(encoder, from_scratch=True, backbone_args=TIMM[encoder], image_size=SIZE)
    return SSLModel.from_backbone(backbone, "dino", DINO, image_size=SIZE)


def trainer(folder: Path, model: nn.Module, **options: Any) -> E2MCTrainer:
    arguments = E2MCTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        optimizer="adamw",
        **({"max_steps": 4, "logging_steps": 1} | options),
    )
    views = ViewArguments(image_size=SIZE, num_small_views=2, small_image_size=SMALL_SIZE)
    source = load_images(DataArguments(max_samples=32), "train")
    return E2MCTrainer(
        model, arguments, ViewDataset(source, ViewTransform(views, new_model().backbone.image_settings), seed=0)
    )


def losses(run: E2MCTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_run_with_checkpoints_has_the_same_losses_and_leaves_ordinary_weights(tmp_path: Path) -> None:
    plain, other = (
        trainer(tmp_path / "plain", new_model()),
        trainer(tmp_path / "other", new_model(), channels_last=True, save_strategy="steps", save_steps=2),
    )
    plain.train()
    other.train()
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)
    assert all(tensor.is_contiguous() for tensor in other.model.state_dict().values())
    assert not other.model.backbone._forward_pre_hooks
    saved = load_file(tmp_path / "other" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == dict(plain.model.state_dict()).keys()
    resumed = trainer(tmp_path / "other", new_model(), channels_last=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))
    assert same_state(resumed.model, other.model)


def test_convolutions_of_encoder_and_teacher_get_and_give_channels_last() -> None:
    model = new_model().train()
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend(
            tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (module.weight, *inputs, output)
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    views = [torch.randn(4, 3, size, size) for size in (SIZE, SIZE, SMALL_SIZE)]
    with channels_last(model, True):
        model(views)
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    ("model", "count"), [(lambda: new_model("vit_tiny_patch16_224"), 1), (lambda: nn.Linear(2, 2), 0)]
)
def test_encoders_without_convolutions_are_refused(tmp_path: Path, model: Any, count: int) -> None:
    rule = f"`channels_last` needs an encoder of 2-D convolutions, not a patch embedding alone, got '{count} of them'"
    with pytest.raises(UsageError, match=rule):
        trainer(tmp_path / "run", model(), channels_last=True)
    assert not (tmp_path / "run").exists()
