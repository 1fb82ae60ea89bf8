from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2mc_hf.objectives.simsiam import SimSiam

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def views(arrays: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([arrays["x"], arrays["y"]]).to(dtype).requires_grad_()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_negative_cosine_is_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    z = views(arrays, dtype)
    loss = SimSiam(4, 8, 4).score(z, z)
    assert loss.item() == pytest.approx(values["simsiam.negcos"], rel=tolerance)
    assert loss.dtype == dtype


def test_loss_is_that_of_a_loop_over_samples_with_its_gradient_through_predictions_only() -> None:
    p, z = torch.randn(2, 2, 5, 3, dtype=torch.float64).unbind()
    p, z = p.requires_grad_(), z.requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        for a, b in ((p[0, i], z[1, i]), (p[1, i], z[0, i])):
            expected = expected - (a @ b.detach()) / (a.norm() * b.detach().norm()) / 10
    loss = SimSiam(4, 3, 4).score(p, z)
    (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, p)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    assert torch.autograd.grad(loss, z, allow_unused=True) == (None,)


def test_heads_have_the_layers_of_the_paper() -> None:
    objective = SimSiam(16, 32, 8)
    projector, predictor = objective.projector, objective.predictor
    assert [type(m).__name__ for m in projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [(m.in_features, m.out_features, m.bias is None) for m in projector if isinstance(m, nn.Linear)] == [
        (16, 32, True),
        (32, 32, True),
        (32, 32, True),
    ]
    assert not projector[-1].affine
    assert projector[1].affine
    assert [type(m).__name__ for m in predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [(m.in_features, m.out_features, m.bias is None) for m in predictor if isinstance(m, nn.Linear)] == [
        (32, 8, True),
        (8, 32, False),
    ]
    assert [m.out_features for m in SimSiam(4).predictor if isinstance(m, nn.Linear)] == [512, 2048]


def test_a_frozen_bias_before_the_last_normalization_folds_into_its_running_mean() -> None:
    ours = SimSiam(4, 6, 3).projector
    theirs = nn.Sequential(*(m for m in SimSiam(4, 6, 3).projector))
    theirs[6] = nn.Linear(6, 6)
    theirs(3 * torch.randn(64, 4))  # running statistics of their own
    state = theirs.state_dict()
    state["7.running_mean"] = state["7.running_mean"] - state.pop("6.bias")
    ours.load_state_dict(state)
    x = torch.randn(8, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_both_embeddings_reach_the_regularizer_with_gradient() -> None:
    objective = SimSiam(4, 6, 3)
    features = [torch.randn(8, 4, requires_grad=True) for _ in range(2)]
    output = objective(features)
    assert output.embeddings.shape == (2, 8, 6)
    for view in range(2):
        gradients = torch.autograd.grad(output.embeddings[view].pow(3).sum(), features, retain_graph=True)
        assert gradients[view].abs().max() > 0
        assert (gradients[1 - view] == 0).all()
    assert output.loss.item() == pytest.approx(-output.terms["cosine"].item())
    assert not output.terms["cosine"].requires_grad


def test_heads_see_one_view_at_a_time() -> None:
    objective = SimSiam(4, 6, 3)
    features = [torch.randn(8, 4), 5 + torch.randn(8, 4)]
    embeddings = objective(features).embeddings
    torch.testing.assert_close(embeddings.mean(dim=1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings[1], objective.projector(features[1]))


def test_zero_vectors_have_cosine_zero_and_a_finite_gradient() -> None:
    p = torch.randn(2, 4, 3)
    p[0, 0], p[1, 1] = 0, 1e-30
    p.requires_grad_()
    z = torch.randn(2, 4, 3)
    z[0, 2] = 0
    loss = SimSiam(4, 3, 4).score(p, z)
    (gradient,) = torch.autograd.grad(loss, p)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[0, 0] == 0).all()
    assert (gradient[1, 2] == 0).all()
    assert SimSiam(4, 3, 4).score(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)) == 0


def test_loss_is_float32_under_autocast() -> None:
    p, z = torch.randn(2, 2, 16, 8).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SimSiam(4, 8, 4).score(p, z)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, SimSiam(4, 8, 4).score(p, z))


def test_the_predictor_keeps_the_learning_rate_it_is_given() -> None:
    assert SimSiam(4, 8, 4).fixed_learning_rates() == {}
    assert SimSiam(4, 8, 4, predictor_learning_rate=0.1).fixed_learning_rates() == {"predictor": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_dim": 0}, "`projector_dim` and `predictor_dim` must be at least 1, got 0 and 512"),
        ({"predictor_dim": 0}, "`projector_dim` and `predictor_dim` must be at least 1, got 2048 and 0"),
        ({"predictor_learning_rate": 0.0}, "`predictor_learning_rate` must be positive, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimSiam(4, **options)


def test_three_views_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_views` must be 2 for simsiam, got 3"):
        SimSiam(4, 8, 4)([torch.randn(4, 4)] * 3)


def test_training_brings_views_together_without_collapse() -> None:
    objective = SimSiam(8, 16, 8)
    features = torch.randn(64, 8)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        output = objective([features + 0.1 * torch.randn(64, 8) for _ in range(2)])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < -0.9
    assert abs(losses[0]) < 0.5
    assert output.embeddings.std(dim=1).min() > 0.5
