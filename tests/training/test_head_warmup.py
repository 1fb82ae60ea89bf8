import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data.image_files import encoded
from torch import Tensor

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.retrying import RemoteFileUnreachableError
from e2mc_hf.data.shards import Shard
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.head_warmup import is_level, warm_up_heads
from e2mc_hf.training.trainer import E2MCTrainer

SMALL: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dim": 32},
    "byol": {"projector_dim": 16, "hidden_dim": 16},
    "swav": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12},
    "simsiam": {"projector_dim": 16, "predictor_dim": 8, "predictor_learning_rate": 1.0},
}


def new_model(objective: str = "vicreg") -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    return SSLModel.from_backbone(backbone, objective, SMALL[objective], image_size=32)


def views_of_digits(model: SSLModel, num_images: int = 64) -> ViewDataset:
    views = ViewArguments(image_size=32, flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=[0.0])
    source = load_images(DataArguments(max_samples=num_images), "train")
    return ViewDataset(source, ViewTransform(views, model.backbone.image_settings), seed=0)


def arguments(tmp_path: Path, **options: Any) -> E2MCTrainingArguments:
    return E2MCTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, per_device_train_batch_size=16, disable_tqdm=True, **options
    )


def state(model: SSLModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("objective", ["vicreg", "byol"])
@pytest.mark.parametrize("batch_norm", ["synchronized", "frozen"])
def test_only_heads_change_and_the_encoder_keeps_weights_and_statistics(
    tmp_path: Path, objective: str, batch_norm: str
) -> None:
    model = new_model(objective).train()
    before, trainable = state(model), {n for n, p in model.named_parameters() if p.requires_grad}
    taken = warm_up_heads(
        model, arguments(tmp_path, head_warmup="3", batch_norm=batch_norm), views_of_digits(model), new_heads=True
    )
    assert taken == 3
    after = state(model)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    heads = {name for name, _ in model.named_parameters() if name.startswith("objective.")}
    assert heads <= changed
    assert not any(name.startswith(("backbone.", "teacher.")) for name in changed)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert not (tmp_path / "run").exists()


def test_the_teachers_head_ends_as_a_copy_of_the_students(tmp_path: Path) -> None:
    model = new_model("byol")
    warm_up_heads(model, arguments(tmp_path, head_warmup="2"), views_of_digits(model), new_heads=True)
    for own, teachers in model.objective.teacher_pairs():
        for parameter, copied in zip(own.parameters(), teachers.parameters(), strict=True):
            assert torch.equal(parameter, copied)


def test_the_encoder_trains_again_afterwards_and_follows_its_batches(tmp_path: Path) -> None:
    model = new_model()
    dataset = views_of_digits(model)
    run = arguments(tmp_path, max_steps=1, optimizer="sgd", regularizer="none", head_warmup="1")
    warm_up_heads(model, run, dataset, new_heads=True)
    before = state(model)
    E2MCTrainer(model, run, dataset).train()
    after = state(model)
    stem = "backbone.model.timm_model.conv1.0.weight", "backbone.model.timm_model.conv1.1.running_mean"
    assert not any(torch.equal(after[name], before[name]) for name in stem)


@pytest.mark.parametrize(
    ("option", "new_heads", "trains"),
    [("auto", True, True), ("auto", False, False), ("none", True, False), ("0", True, False), ("2", False, True)],
)
def test_auto_fits_new_heads_only_and_a_number_always(
    tmp_path: Path, option: str, new_heads: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e2mc_hf.training.head_warmup._MOST_EPOCHS", 1)
    monkeypatch.setattr("e2mc_hf.training.head_warmup._MOST_STEPS", (4, 4))
    model = new_model()
    before = state(model)
    taken = warm_up_heads(model, arguments(tmp_path, head_warmup=option), views_of_digits(model), new_heads=new_heads)
    assert (taken > 0) == trains
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items()) != trains


def test_a_run_and_its_control_start_from_the_same_heads(tmp_path: Path) -> None:
    control, regularized = new_model(), new_model()
    dataset = views_of_digits(control)
    warm_up_heads(control, arguments(tmp_path, head_warmup="3", regularizer="none"), dataset, new_heads=True)
    options = {"regularizer_args": {"entropy_weight": 5.0}, "learning_rate": 0.5, "optimizer": "sgd"}
    warm_up_heads(regularized, arguments(tmp_path, head_warmup="3", **options), dataset, new_heads=True)
    expected = state(control)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(regularized).items())


def test_the_log_says_how_long_it_took_and_how_far_the_loss_fell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model()
    with caplog.at_level(logging.WARNING, "e2mc_hf"):
        warm_up_heads(model, arguments(tmp_path, head_warmup="2"), views_of_digits(model), new_heads=True)
    assert "The heads are fitted on the frozen encoder first, for at most 2 steps." in caplog.text
    assert "The heads were fitted for 2 steps: loss" in caplog.text


def test_a_loss_that_does_not_fall_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model()
    run = arguments(tmp_path, head_warmup="4", head_warmup_learning_rate=3.0)
    warm_up_heads(model, run, views_of_digits(model), new_heads=True)
    assert "`head_warmup` did not lower the loss" in caplog.text


class Unreachable(Shard):
    """A shard whose server is out of reach after some images."""

    def __init__(self, images: list[bytes], most: int) -> None:
        self.images = images
        self.left = most

    @property
    def rows(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        for image in self.images[start:stop]:
            if self.left == 0:
                raise RemoteFileUnreachableError("http://server cannot be reached.")
            self.left -= 1
            yield image


def test_heads_whose_images_stop_coming_are_not_said_to_be_saved(tmp_path: Path) -> None:
    model = new_model()
    images = StreamSource([Unreachable(encoded(64), 50)], "image", "tiny", None)
    transform = views_of_digits(model).transform
    dataset = ViewDataset(images, transform, seed=0, shuffle_window=20)
    with pytest.raises(UsageError, match=r"cannot be reached\. The heads .* nothing to resume: start the run again\.$"):
        warm_up_heads(model, arguments(tmp_path, head_warmup="9"), dataset, new_heads=True)


def test_prototypes_and_predictors_learn_like_every_head(tmp_path: Path) -> None:
    for objective, head in (("swav", "prototypes"), ("simsiam", "predictor")):
        model = new_model(objective)
        before = state(model)
        warm_up_heads(model, arguments(tmp_path, head_warmup="2"), views_of_digits(model), new_heads=True)
        moved = [
            (tensor - before[name]).abs().max().item()
            for name, tensor in state(model).items()
            if name.startswith(f"objective.{head}") and name in dict(model.named_parameters())
        ]
        # Two steps of AdamW at 0.001 (and rows brought to unit norm), although the predictor's own rate is 1.
        assert 0 < max(moved) <= 0.01


def test_a_teacher_of_its_own_keeps_its_backbone(tmp_path: Path) -> None:
    model = new_model("byol")
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1)
    before = state(model)
    warm_up_heads(model, arguments(tmp_path, head_warmup="2"), views_of_digits(model), new_heads=False)
    assert all(torch.equal(t, before[name]) for name, t in state(model).items() if name.startswith("teacher."))


def test_how_the_run_logs_does_not_matter(tmp_path: Path) -> None:
    model = new_model()
    run = arguments(tmp_path, head_warmup="2", logging_strategy="no", lr_scheduler_type="cosine")
    assert warm_up_heads(model, run, views_of_digits(model), new_heads=True) == 2


def test_a_falling_loss_is_not_level_and_a_flat_one_is() -> None:
    falling = [10.0 - 0.1 * step for step in range(60)]
    flat = [10.0, 9.0, 8.0] + [7.0] * 9
    assert not any(is_level(falling[:count], 3) for count in range(61))
    level_at = [count for count in range(1, 13) if is_level(flat[:count], 1)]
    assert level_at[0] == 7  # three windows without a new minimum after the fourth
    assert is_level([5.0] * 4, 1)
    assert not is_level([5.0] * 3, 1)
