from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.byol import BYOL, prediction_distance
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.options import build
from e2mc_hf.progress import Progress


def naive_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. 2 for one sample at a time, and its counterpart with the views exchanged."""
    total = predictions.new_zeros(())
    num_samples = predictions.shape[1]
    for view in (0, 1):
        for q, z in zip(predictions[view], targets[1 - view], strict=True):
            total = total + (2 - 2 * (q @ z) / (q.norm() * z.norm())) / num_samples
    return total


def two_views(seed: int, num_samples: int, num_dims: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_samples, num_dims)
    predictions, targets = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return predictions, targets


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), num_samples=st.integers(1, 6), num_dims=st.integers(1, 6))
def test_loss_and_gradient_are_those_of_the_equation(seed: int, num_samples: int, num_dims: int) -> None:
    predictions, targets = two_views(seed, num_samples, num_dims)
    predictions.requires_grad_()
    loss, expected = prediction_distance(predictions, targets), naive_distance(predictions, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, predictions)
    (expected_gradient,) = torch.autograd.grad(expected, predictions)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([3.0, 0.0], [0.5, 0.0], 0.0),
        ([3.0, 0.0], [-0.5, 0.0], 8.0),
        ([3.0, 0.0], [0.0, 0.5], 4.0),
        ([1.0, 1.0], [1.0, 0.0], 4 - 2 * 2**0.5),
    ],
    ids=["parallel", "opposite", "orthogonal", "45 degrees"],
)
def test_distance_of_vectors_worked_by_hand(first: list[float], second: list[float], expected: float) -> None:
    predictions = torch.tensor([[first], [second]], dtype=torch.float64)
    targets = torch.tensor([[first], [second]], dtype=torch.float64)
    assert prediction_distance(predictions, targets).item() == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 2**31))
def test_scales_of_rows_order_of_samples_and_order_of_views_do_not_matter(seed: int) -> None:
    predictions, targets = two_views(seed, 6, 4)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.empty(2, 2, 6, 1, dtype=torch.float64).log_normal_(0, 3, generator=generator)
    order = torch.randperm(6, generator=generator)
    expected = prediction_distance(predictions, targets).item()
    for same in (
        (scale[0] * predictions, scale[1] * targets),
        (predictions[:, order], targets[:, order]),
        (predictions.flip(0), targets.flip(0)),
    ):
        assert prediction_distance(*same).item() == pytest.approx(expected, rel=1e-12)


def test_nearly_parallel_vectors_keep_their_digits_in_float32() -> None:
    angle = 1e-4
    predictions = torch.tensor([[[1.0, angle]], [[1.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert prediction_distance(predictions, targets).item() == pytest.approx(angle**2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["equal", "zero", "one zero row", "zero targets", "tiny"])
def test_collapsed_predictions_have_a_finite_loss_and_gradient(kind: str, dtype: torch.dtype) -> None:
    predictions, targets = torch.randn(2, 2, 8, 4, dtype=dtype)
    if kind == "zero targets":
        targets = 0 * targets
    elif kind == "one zero row":
        predictions[1, 3] = 0
    else:
        predictions = {"equal": targets[:, :1].expand(2, 8, 4), "zero": 0 * targets, "tiny": 1e-30 * targets}[kind]
    predictions = predictions.clone().requires_grad_()
    loss = prediction_distance(predictions, targets)
    (gradient,) = torch.autograd.grad(loss, predictions)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    predictions, targets = torch.randn(2, 2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prediction_distance(predictions.bfloat16(), targets.bfloat16())
        whole = BYOL(4, 3, 5)(list(torch.randn(2, 8, 4)), list(torch.randn(2, 8, 4))).loss
    assert loss.dtype == whole.dtype == torch.float32
    assert torch.equal(loss, prediction_distance(predictions.bfloat16().float(), targets.bfloat16().float()))


def test_heads_have_the_layers_of_the_paper() -> None:
    objective = BYOL(2048)
    for head, in_dim in [(objective.projector, 2048), (objective.predictor, 256), (objective.teacher_projector, 2048)]:
        assert isinstance(head, nn.Sequential)
        assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [(m.in_features, m.out_features, m.bias is not None) for m in head if isinstance(m, nn.Linear)] == [
            (in_dim, 4096, True),
            (4096, 256, False),
        ]


def test_each_view_is_predicted_from_the_other() -> None:
    objective = BYOL(4, 3, 5)
    update_teacher(BYOL(4, 3, 5).projector, objective.teacher_projector, 0.5)
    features, teacher_features = list(torch.randn(2, 8, 4)), list(torch.randn(2, 8, 4))
    output = objective(features, teacher_features)
    expected = 4.0
    for view in (0, 1):
        prediction = objective.predictor(objective.projector(features[view]))
        target = objective.teacher_projector(teacher_features[1 - view])
        expected = expected - 2 * F.cosine_similarity(prediction, target).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.embeddings, torch.stack([objective.projector(view) for view in features]))
    assert output.terms == {"prediction_distance": output.loss}
    assert not output.terms["prediction_distance"].requires_grad


def test_gradient_reaches_the_student_and_never_the_teacher() -> None:
    objective = BYOL(4, 3, 5)
    teacher_features = [torch.randn(8, 4, requires_grad=True) for _ in range(2)]
    objective(list(torch.randn(2, 8, 4)), teacher_features).loss.backward()
    for head in (objective.projector, objective.predictor):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in objective.teacher_projector.parameters())
    assert all(view.grad is None for view in teacher_features)


def test_teacher_starts_as_a_frozen_copy_of_the_student() -> None:
    objective = BYOL(4, 3, 5)
    ((student, teacher),) = objective.teacher_pairs()
    assert student is objective.projector
    assert teacher is objective.teacher_projector
    for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, theirs)
        assert own.data_ptr() != theirs.data_ptr()
        assert theirs.requires_grad
        assert not own.requires_grad


def test_teachers_head_takes_batch_statistics_when_the_student_does() -> None:
    objective = BYOL(4, 3, 5)
    norm = objective.teacher_projector[1]
    objective.eval()
    assert not norm.training
    objective(list(torch.randn(2, 8, 4)), list(torch.randn(2, 8, 4)))
    assert norm.num_batches_tracked == 0
    objective.train()
    assert norm.training
    objective(list(torch.randn(2, 8, 4)), list(torch.randn(2, 8, 4)))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.99, 0.996])
def test_momentum_rises_from_its_start_to_one_over_the_run(momentum: float) -> None:
    objective = BYOL(4, 3, 5, momentum=momentum)
    momenta = []
    for step in range(101):
        objective.set_progress(Progress(step, total_steps=101, steps_per_epoch=10))
        momenta.append(objective.teacher_momentum())
    assert momenta[0] == pytest.approx(momentum, abs=1e-15)
    assert momenta[25] == pytest.approx(1 - (1 - momentum) * (1 + 0.5**0.5) / 2, abs=1e-15)
    assert momenta[50] == pytest.approx((1 + momentum) / 2, abs=1e-15)
    assert momenta[100] == 1
    assert all(earlier < later for earlier, later in pairwise(momenta))


def test_loaded_weights_score_alike() -> None:
    objective, other = BYOL(4, 3, 5), BYOL(4, 3, 5)
    other.load_state_dict(objective.state_dict())
    features, teacher_features = list(torch.randn(2, 8, 4)), list(torch.randn(2, 8, 4))
    assert torch.equal(objective(features, teacher_features).loss, other(features, teacher_features).loss)


@pytest.mark.parametrize(
    ("num_views", "teachers", "message"),
    [
        (3, 3, "`num_views` must be 2 for byol, got 3"),
        (2, None, "`teacher_features` must hold both views for byol, got none"),
        (2, 1, "`teacher_features` must hold both views for byol, got 1"),
    ],
)
def test_other_than_two_views_of_student_and_teacher_are_refused(
    num_views: int, teachers: int | None, message: str
) -> None:
    teacher_features = None if teachers is None else [torch.randn(4, 4)] * teachers
    with pytest.raises(ValueError, match=message):
        BYOL(4, 3, 5)([torch.randn(4, 4)] * num_views, teacher_features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_dim": 0}, "`projector_dim` and `hidden_dim` must be at least 1, got 0 and 4096"),
        ({"momentum": 1.5}, r"`momentum` must lie in \[0, 1\], got 1\.5"),
        ({"momentum": float("nan")}, r"`momentum` must lie in \[0, 1\], got nan"),
        ({"teacher_buffers": "mean"}, "'teacher_buffers' of type .* got 'mean'"),
        ({"tau": 0.996}, "no option 'tau'"),
    ],
)
def test_unfit_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(BYOL, options, "objective_args", 16)
