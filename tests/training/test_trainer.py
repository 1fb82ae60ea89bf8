import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

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

BATCH = 32


def digits(num_images: int) -> ViewDataset:
    views = ViewArguments(image_size=32, flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=[0.0])
    source = load_images(DataArguments(max_samples=num_images), "train")
    return ViewDataset(source, ViewTransform(views, new_model().backbone.image_settings), seed=0)


def new_model() -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    return SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 48}, image_size=32)


def trainer(tmp_path: Path, model: nn.Module | None = None, **options: Any) -> E2MCTrainer:
    dataset = options.pop("dataset", None) or digits(128)
    collator = {"data_collator": options.pop("data_collator")} if "data_collator" in options else {}
    regularizer = options.pop("regularizer_module", None)
    options = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.1} | options
    arguments = E2MCTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=BATCH, disable_tqdm=True, **options
    )
    model = model or new_model()
    return E2MCTrainer(model, arguments, dataset, dataset, regularizer=regularizer, **collator)


def weights_after_training(run: E2MCTrainer) -> dict[str, Tensor]:
    run.train()
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def train_logs(run: E2MCTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


def test_loss_is_the_objective_plus_the_weighted_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, regularizer_args={"entropy_weight": 10, "covariance_weight": 3})
    run.train()
    logs = train_logs(run)
    assert len(logs) == 3
    for log in logs:
        objective = 25 * log["invariance"] + 25 * log["variance"] + log["covariance"]
        assert log["objective_loss"] == pytest.approx(objective, rel=1e-5)
        total = objective + 3 * log["off_diagonal_covariance"] - 10 * log["marginal_entropy"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)


def plain_sgd(steps: int) -> dict[str, Tensor]:
    """The objective alone, written out: the batches of the Trainer, no Trainer."""
    model, dataset = new_model(), digits(128)
    from e2mc_hf.data.loader import ViewLoader

    loader = ViewLoader(dataset, BATCH, rank=0, world_size=1, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-6},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    model.train()
    for _, batch in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return dict(model.state_dict())


def test_control_is_the_plain_objective_bit_for_bit(tmp_path: Path) -> None:
    run = trainer(tmp_path, regularizer="none", optimizer="sgd", learning_rate=0.01)
    control, plain = weights_after_training(run), plain_sgd(3)
    assert "marginal_entropy" not in train_logs(run)[0]
    for name, weight in plain.items():
        assert torch.equal(control[name], weight), name


def test_p14_weight_zero_is_the_control_bit_for_bit_and_still_logs_its_terms(tmp_path: Path) -> None:
    control = trainer(tmp_path, regularizer="none")
    zero = trainer(tmp_path, regularizer_args={"entropy_weight": 0, "covariance_weight": 0})
    expected, weights = weights_after_training(control), weights_after_training(zero)
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert [log["loss"] for log in train_logs(zero)] == [log["loss"] for log in train_logs(control)]
    assert train_logs(zero)[0]["marginal_entropy"] < 0


def test_terms_are_averaged_over_the_steps_between_two_logs(tmp_path: Path) -> None:
    each, together = trainer(tmp_path, max_steps=4), trainer(tmp_path, max_steps=4, logging_steps=2)
    each.train()
    together.train()
    values = [log["marginal_entropy"] for log in train_logs(each)]
    expected = [sum(values[:2]) / 2, sum(values[2:]) / 2]
    assert [log["marginal_entropy"] for log in train_logs(together)] == pytest.approx(expected, rel=1e-6)


def test_evaluation_reports_loss_and_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_eval_batch_size=BATCH)
    metrics = run.evaluate()
    objective = 25 * metrics["eval_invariance"] + 25 * metrics["eval_variance"] + metrics["eval_covariance"]
    total = objective + 100 * metrics["eval_off_diagonal_covariance"] - 1000 * metrics["eval_marginal_entropy"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


def test_several_datasets_are_evaluated_each_by_its_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_eval_batch_size=BATCH)
    alone = run.evaluate()["eval_loss"]
    run.eval_dataset = {"one": digits(128), "two": digits(64)}
    metrics = run.evaluate()
    assert metrics["eval_one_loss"] == alone
    assert "eval_two_loss" in metrics


def test_fewer_images_to_evaluate_on_than_a_batch_are_refused_with_the_option_to_change(tmp_path: Path) -> None:
    rule = "`per_device_eval_batch_size` times 1 processes must not exceed the 128 images to evaluate on, got 129"
    with pytest.raises(UsageError, match=rule):
        trainer(tmp_path, per_device_eval_batch_size=129).evaluate()
    with pytest.raises(UsageError, match=rule):
        trainer(tmp_path, per_device_eval_batch_size=129, eval_strategy="steps")


class Points(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.randn(2, 6, generator=torch.Generator().manual_seed(index))}


class TwoViewRegression(nn.Module):
    """Any model with `loss` and `embeddings` in its output, and nothing else of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embeddings = self.linear(x).transpose(0, 1)
        return {"loss": (embeddings[0] - embeddings[1]).square().mean(), "embeddings": embeddings}


def test_any_model_with_loss_and_embeddings_can_be_regularized(tmp_path: Path) -> None:
    run = trainer(tmp_path, TwoViewRegression(), dataset=Points(), max_steps=40, optimizer="adamw", learning_rate=0.01)
    run.train()
    logs = train_logs(run)
    assert logs[-1]["marginal_entropy"] > logs[0]["marginal_entropy"]


def test_any_model_is_evaluated_with_loss_and_terms(tmp_path: Path) -> None:
    metrics = trainer(tmp_path, TwoViewRegression(), dataset=Points(), per_device_eval_batch_size=BATCH).evaluate()
    assert {"eval_loss", "eval_objective_loss", "eval_marginal_entropy"} <= metrics.keys()


def test_a_window_as_wide_as_the_batch_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    rule = f"does not fit a batch of {BATCH} over all processes: `window` must lie between 1 and N - 1 = {BATCH - 1}"
    with pytest.raises(UsageError, match=rule):
        trainer(tmp_path / "run", regularizer_args={"window": BATCH})
    assert not (tmp_path / "run").exists()


class Constant(nn.Module):
    def forward(self, embeddings: Tensor) -> Any:
        class Output(NamedTuple):
            loss: Tensor
            terms: dict[str, Tensor]

        return Output(embeddings.sum() * 0 + 7, {"seven": torch.tensor(7.0)})


def test_a_regularizer_of_ones_own_can_be_passed(tmp_path: Path) -> None:
    run = trainer(tmp_path, regularizer_module=Constant(), max_steps=1)
    run.train()
    (log,) = train_logs(run)
    assert log["loss"] == pytest.approx(log["objective_loss"] + 7, rel=1e-6)
    assert log["seven"] == 7


class Exploding(E2MCRegularizer):
    def forward(self, embeddings: Tensor) -> Any:
        output = super().forward(embeddings)
        return output._replace(loss=output.loss * math.nan)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    model = new_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(tmp_path, model, regularizer_module=Exploding())
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        run.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    first, second = (weights_after_training(trainer(tmp_path)) for _ in range(2))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one(tmp_path: Path) -> None:
    whole = weights_after_training(trainer(tmp_path / "whole", max_steps=6))
    trainer(tmp_path / "cut", max_steps=6, save_strategy="steps", save_steps=3).train()
    resumed = trainer(tmp_path / "cut", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert all(torch.equal(resumed.model.state_dict()[name], weight) for name, weight in whole.items())


def test_bfloat16_autocast_keeps_the_criterion_in_float32(tmp_path: Path) -> None:
    run, exact = trainer(tmp_path, bf16=True, max_steps=1), trainer(tmp_path, max_steps=1)
    run.train()
    exact.train()
    entropy, expected = (train_logs(r)[0]["marginal_entropy"] for r in (run, exact))
    assert entropy == pytest.approx(expected, abs=0.02)
    assert run.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 0.1), ("cosine", 0.1 * (1 + math.cos(math.pi * 2 / 3)) / 2)]
)
def test_schedules_are_constant_and_cosine(tmp_path: Path, schedule: str, last: float) -> None:
    run = trainer(tmp_path, lr_scheduler_type=schedule)
    run.train()
    assert train_logs(run)[-1]["learning_rate"] == pytest.approx(last)


def test_a_batch_of_three_is_refused(tmp_path: Path) -> None:
    arguments = E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    with pytest.raises(UsageError, match="`per_device_train_batch_size` times 1 processes must be at least 4, got 3"):
        E2MCTrainer(new_model(), arguments, digits(32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must stay false"),
        ({"optim": "adafactor"}, "`optim` has no effect here"),
        ({"adam_beta2": 0.5}, "`adam_beta2` has no effect here"),
        ({"auto_find_batch_size": True}, "must be off"),
        ({"num_train_epochs": 0.0}, "`num_train_epochs` must be positive"),
        ({"optimizer": "adam"}, "`optimizer` must be lars, adamw or sgd, got 'adam'"),
    ],
)
def test_options_that_would_change_the_training_silently_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
