import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.mec import MEC
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.options import build
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.coding_length import cross_log_det
from e2mc_hf.regularizers.sphere import unit_rows

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def mec(feature_dim: int = 4, projector_dim: int = 8, predictor_dim: int = 4, **options: Any) -> MEC:
    return MEC(feature_dim, projector_dim, predictor_dim, **{"lambda_warmup_epochs": 0, **options})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("form", ["auto", "batch", "feature"])
def test_loss_and_gradients_are_the_authors(
    golden: Golden, case: str, dtype: torch.dtype, tolerance: float, form: str
) -> None:
    values, arrays = golden(case)
    views = torch.stack([arrays["x"], arrays["y"]]).to(dtype).requires_grad_()
    objective = mec(form=form, eps_d_squared=values["mec.lambda_inv"] / values["N"])
    loss, _ = objective.score(views, views)
    (gradient,) = torch.autograd.grad(loss, views)
    assert loss.item() == pytest.approx(values["mec.loss_order4"], rel=tolerance)
    for view, name in zip(gradient, "xy", strict=True):
        expected = arrays[f"mec.grad_{name}"]
        assert (view.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
def test_loss_is_that_of_a_loop_over_terms(order: int) -> None:
    p, z = torch.randn(2, 2, 6, 3, dtype=torch.float64).unbind()
    expected = 0.0
    for a, b in ((p[0], z[1]), (p[1], z[0])):
        c = torch.tensor([[F.cosine_similarity(x, y, dim=0).item() for y in b] for x in a], dtype=torch.float64)
        c, power = c / (6 * 0.5), torch.eye(6, dtype=torch.float64)
        for k in range(1, order + 1):
            power = power @ c
            expected -= 0.5 * 0.5 * (-1) ** (k + 1) / k * power.trace().item()  # 1/(lambda N) = eps_d^2 = 0.5
    loss, terms = mec(order=order, eps_d_squared=0.5).score(p, z)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert terms["coding_length"].item() == pytest.approx(-expected / 0.5 * (6 + 3) / 2 / 6, rel=1e-12)


def test_one_term_is_the_negative_mean_cosine() -> None:
    p, z = torch.randn(2, 2, 6, 3, dtype=torch.float64).unbind()
    loss, _ = mec(order=1).score(p, z)
    assert loss.item() == pytest.approx(-F.cosine_similarity(p, z.flip(0), dim=-1).mean().item(), rel=1e-12)


def test_distortion_is_the_papers_unless_the_codes_is_named() -> None:
    assert MEC(4, 8, 4, lambda_warmup_epochs=0).inverse_lambda(1024) == pytest.approx(61.44)
    assert mec(eps_d_squared="code").inverse_lambda(1024) == 32


def test_inverse_lambda_falls_from_eight_times_its_value_over_the_warmup() -> None:
    objective = MEC(4, 8, 4, eps_d_squared="code", lambda_warmup_epochs=10)
    found = []
    for step in (0, 250, 500, 999, 1000, 5000):
        objective.set_progress(Progress(step, 10_000, 100))
        found.append(objective.inverse_lambda(1024))
    assert found == pytest.approx([256, 200, 144, 32 + 0.224, 32, 32])
    p, z = torch.randn(2, 2, 8, 8, dtype=torch.float64).unbind()
    objective.set_progress(Progress(500, 10_000, 100))
    weaker = mec(eps_d_squared=0.03125 * 4.5).score(p, z)[0]
    assert objective.score(p, z)[0].item() == pytest.approx(weaker.item(), rel=1e-12)


def test_the_teachers_momentum_rises_on_a_cosine_to_one() -> None:
    objective = mec()
    found = []
    for step in (0, 50, 100):
        objective.set_progress(Progress(step, 101, 10))
        found.append(objective.teacher_momentum())
    assert found == pytest.approx([0.996, 0.998, 1.0], abs=1e-12)


def test_heads_have_the_layers_of_the_paper_and_the_teacher_a_frozen_copy() -> None:
    objective = MEC(16, 32, 8)
    assert [type(m).__name__ for m in objective.projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "BatchNorm1d",
    ]
    assert not objective.projector[-1].affine
    assert [(m.in_features, m.out_features) for m in objective.predictor if isinstance(m, nn.Linear)] == [
        (32, 8),
        (8, 32),
    ]
    ((student, teacher),) = objective.teacher_pairs()
    assert student is objective.projector
    assert teacher is objective.teacher_projector
    assert not any(p.requires_grad for p in teacher.parameters())
    theirs = dict(student.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in teacher.named_parameters())
    assert objective.teacher_buffers == "own"
    assert MEC(4).projector[0].out_features == 2048


def test_gradient_reaches_the_student_and_its_embeddings_but_not_the_teacher() -> None:
    objective = mec()
    features = [torch.randn(16, 4, requires_grad=True) for _ in range(2)]
    teacher_features = [torch.randn(16, 4, requires_grad=True) for _ in range(2)]
    output = objective(features, teacher_features)
    output.loss.backward()
    assert all(view.grad.abs().max() > 0 for view in features)
    assert all(view.grad is None for view in teacher_features)
    assert all(p.grad is None for p in objective.teacher_projector.parameters())
    assert all(p.grad.abs().max() > 0 for p in objective.projector.parameters())
    assert output.embeddings.shape == (2, 16, 8)
    assert output.embeddings.requires_grad
    assert set(output.terms) == {"coding_length", "spectral_radius"}
    assert not any(term.requires_grad for term in output.terms.values())


def test_predictions_of_one_view_meet_the_teachers_embeddings_of_the_other() -> None:
    objective = mec(order=1)
    features, teacher_features = [torch.randn(16, 4) for _ in range(2)], [torch.randn(16, 4) for _ in range(2)]
    p = [objective.predictor(objective.projector(view)) for view in features]
    z = [objective.teacher_projector(view) for view in teacher_features]
    expected = -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2
    torch.testing.assert_close(objective(features, teacher_features).loss, expected)


def test_the_teachers_head_follows_the_mode_of_training() -> None:
    objective = mec()
    assert all(m.training for m in objective.train().teacher_projector if isinstance(m, nn.BatchNorm1d))
    assert not any(m.training for m in objective.eval().teacher_projector if isinstance(m, nn.BatchNorm1d))


def test_exact_loss_is_the_log_determinant() -> None:
    p = torch.randn(2, 6, 3, dtype=torch.float64)
    z = p.flip(0) + 0.3 * torch.randn(2, 6, 3, dtype=torch.float64)
    loss, terms = mec(exact=True).score(p, z)
    lengths = [cross_log_det(unit_rows(p[v]), unit_rows(z[1 - v]), 1 / (6 * 0.06)) for v in range(2)]
    assert all(sign == 1 for sign, _ in lengths)
    assert loss.item() == pytest.approx(-0.06 * sum(value.item() for _, value in lengths) / 2, rel=1e-12)
    assert set(terms) == {"coding_length"}
    for form in ("batch", "feature"):
        assert mec(exact=True, form=form).score(p, z)[0].item() == pytest.approx(loss.item(), rel=1e-12)


def test_series_comes_near_the_exact_loss_when_eps_d_squared_is_above_one() -> None:
    p, z = torch.randn(2, 2, 16, 8, dtype=torch.float64).unbind()
    exact = mec(exact=True, eps_d_squared=1.5).score(p, z)[0]
    assert mec(order=60, eps_d_squared=1.5).score(p, z)[0].item() == pytest.approx(exact.item(), abs=1e-9)


@pytest.mark.parametrize("factor", [-1.0, -0.06])
def test_where_the_determinant_is_not_positive_the_cosine_takes_its_place_and_this_is_said_once(
    caplog: pytest.LogCaptureFixture, factor: float
) -> None:
    p = torch.ones(2, 4, 3, dtype=torch.float64).requires_grad_()
    objective = mec(exact=True, eps_d_squared=0.06 if factor == -1 else 1.0)  # determinant 1 - 1/eps_d^2
    with caplog.at_level(logging.WARNING):
        loss, _ = objective.score(p, factor * p.detach())
        objective.score(p, factor * p.detach())
    (gradient,) = torch.autograd.grad(loss, p)
    assert loss.item() == pytest.approx(1.0, rel=1e-12)
    assert gradient.isfinite().all()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "determinant of I + C is not positive" in caplog.text


@pytest.mark.parametrize("eps_d_squared", ["paper", 1.01])
@pytest.mark.parametrize("collapsed", [False, True])
def test_divergence_of_the_series_is_said_once_and_only_where_it_happens(
    caplog: pytest.LogCaptureFixture, eps_d_squared: Any, collapsed: bool
) -> None:
    p = torch.randn(2, 1 if collapsed else 64, 128).expand(2, 64, 128)
    objective = mec(eps_d_squared=eps_d_squared)
    with caplog.at_level(logging.WARNING):
        terms = [objective.score(p, p)[1] for _ in range(2)]
    diverges = collapsed and eps_d_squared == "paper"
    assert len(caplog.records) == int(diverges)
    assert (terms[0]["spectral_radius"] > 1) == diverges
    caplog.clear()
    objective.eval().score(p, p)
    assert not caplog.records


def test_forms_agree_in_float32() -> None:
    p, z = torch.randn(2, 2, 48, 24).unbind()
    losses = [mec(form=form).score(p, z)[0].item() for form in ("auto", "batch", "feature")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["zeros", "equal", "rank one"])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(exact: bool, kind: str) -> None:
    row = torch.randn(16)
    z = {"zeros": 0 * row.expand(2, 8, 16), "equal": row.expand(2, 8, 16), "rank one": torch.randn(2, 8, 1) * row}[kind]
    p = z.clone().requires_grad_()
    loss, _ = mec(exact=exact).score(p, z)
    (gradient,) = torch.autograd.grad(loss, p)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    p, z = torch.randn(2, 2, 16, 8).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = mec().score(p, z)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mec().score(p, z)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_dim": 0}, "`projector_dim` and `predictor_dim` must be at least 1, got 0 and 4"),
        ({"order": 0}, "`order` must be at least 1, got 0"),
        ({"eps_d_squared": 0.0}, "`eps_d_squared` must be paper"),
        ({"lambda_warmup_epochs": -1.0}, "`lambda_warmup_epochs` must not be negative, got -1.0"),
        ({"momentum": 1.5}, r"`momentum` must lie in \[0, 1\], got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mec(**options)


@pytest.mark.parametrize("option", ["form", "eps_d_squared", "teacher_buffers"])
def test_unknown_names_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"`objective_args` takes '{option}' of type .*, got 'papers'"):
        build(MEC, {option: "papers"}, "objective_args", 4)
    for known in {"form": ["batch"], "eps_d_squared": ["code", 1, 0.5], "teacher_buffers": ["copy"]}[option]:
        assert getattr(build(MEC, {option: known}, "objective_args", 4), option) in (known, 0.03125)


def test_three_views_and_a_missing_teacher_are_refused() -> None:
    view = torch.randn(4, 4)
    with pytest.raises(ValueError, match="`num_views` must be 2 for mec, got 3"):
        mec()([view] * 3, [view] * 3)
    with pytest.raises(ValueError, match="`teacher_features` must hold both views for mec, got none"):
        mec()([view] * 2)


def test_training_raises_the_coding_length_and_moves_the_teacher() -> None:
    objective = mec(8, 16, 8, momentum=0.9)
    before = objective.teacher_projector[0].weight.clone()
    features = torch.randn(64, 8)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(60):
        objective.set_progress(Progress(step, 60, 60))
        views = [features + 0.1 * torch.randn(64, 8) for _ in range(2)]
        output = objective(views, views)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for student, teacher in objective.teacher_pairs():
            update_teacher(student, teacher, objective.teacher_momentum(), objective.teacher_buffers)
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert not torch.equal(objective.teacher_projector[0].weight, before)
