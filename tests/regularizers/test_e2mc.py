import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.regularizers.entropy import marginal_entropy

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def views(arrays: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([arrays["x"], arrays["y"]]).to(dtype).requires_grad_()


def assert_gradient(gradient: Tensor, arrays: dict[str, Tensor], key: str, tolerance: float) -> None:
    for view, name in zip(gradient, "xy", strict=True):
        expected = arrays[f"{key}.grad_{name}"]
        assert (view.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_sigmoid_terms_are_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    output = E2MCRegularizer(1000, 100)(views(arrays, dtype))
    entropy, covariance = values["vicreg.ent_loss"], values["vicreg.hypercov_loss"]
    assert output.terms["marginal_entropy"].item() == pytest.approx(entropy, rel=tolerance)
    assert output.terms["off_diagonal_covariance"].item() == pytest.approx(covariance, rel=tolerance)
    assert output.loss.item() == pytest.approx(100 * covariance - 1000 * entropy, rel=tolerance)
    assert output.loss.dtype == dtype


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_normal_cdf_loss_and_gradient_are_the_authors(
    golden: Golden, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    values, arrays = golden(case)
    embeddings = views(arrays, dtype)
    output = E2MCRegularizer(1, 25, "normal_cdf", eps=2**-23)(embeddings)
    (gradient,) = torch.autograd.grad(output.loss, embeddings)
    assert output.loss.item() == pytest.approx(values["normal_cdf.loss_beta1_gamma25"], rel=tolerance)
    assert_gradient(gradient, arrays, "normal_cdf", tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transform", ["sigmoid", "normal_cdf"])
def test_entropy_of_each_dimension_is_the_authors(golden: Golden, case: str, transform: str) -> None:
    _, arrays = golden(case)
    entropy = marginal_entropy(arrays["x"], transform=transform, eps=2**-23)
    torch.testing.assert_close(entropy, arrays[f"{transform}.entropy_x"], rtol=1e-9, atol=0)


def test_loss_is_the_weighted_terms() -> None:
    embeddings = torch.randn(2, 64, 16, dtype=torch.float64)
    output = E2MCRegularizer(3.0, 7.0)(embeddings)
    expected = 7 * output.terms["off_diagonal_covariance"] - 3 * output.terms["marginal_entropy"]
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert not any(term.requires_grad for term in output.terms.values())


def test_a_term_of_weight_zero_is_logged_but_takes_no_part_in_the_gradient() -> None:
    embeddings = torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True)
    (entropy_only,) = torch.autograd.grad(E2MCRegularizer(1, 0)(embeddings).loss, embeddings)
    expected = -torch.stack([marginal_entropy(view, transform="sigmoid").mean() for view in embeddings]).mean()
    (gradient,) = torch.autograd.grad(expected, embeddings)
    assert torch.equal(entropy_only, gradient)
    nothing = E2MCRegularizer(0, 0)(embeddings)
    assert not nothing.loss.requires_grad
    assert nothing.terms["marginal_entropy"] < 0


def test_gradient_is_the_numerical_one() -> None:
    embeddings = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    for transform in ("sigmoid", "normal_cdf"):
        assert torch.autograd.gradcheck(lambda z, t=transform: E2MCRegularizer(2, 3, t)(z).loss, embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_p11_criterion_is_float32_under_autocast(dtype: torch.dtype) -> None:
    embeddings = torch.randn(2, 64, 128)
    plain = E2MCRegularizer()(embeddings)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = E2MCRegularizer()(embeddings)
    assert under_autocast.loss.dtype == torch.float32
    assert torch.equal(under_autocast.loss, plain.loss)


@pytest.mark.parametrize("std", [0.0, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("transform", ["sigmoid", "normal_cdf"])
def test_any_scale_gives_finite_loss_and_gradient(std: float, transform: str) -> None:
    embeddings = (std * torch.randn(2, 64, 8)).requires_grad_()
    output = E2MCRegularizer(transform=transform)(embeddings)
    (gradient,) = torch.autograd.grad(output.loss, embeddings)
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_gradient_descent_spreads_the_marginals_and_decorrelates_them() -> None:
    shared, own = torch.randn(2, 128, 1), torch.randn(2, 128, 4)
    embeddings = (shared + 0.3 * own).pow(3).requires_grad_()
    regularizer = E2MCRegularizer(1.0, 25.0)
    before = regularizer(embeddings)
    optimizer = torch.optim.Adam([embeddings], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(embeddings).loss.backward()
        optimizer.step()
    after = regularizer(embeddings)
    assert after.terms["marginal_entropy"] > before.terms["marginal_entropy"] + 0.1
    assert after.terms["marginal_entropy"] <= math.log(129 / 117)
    assert after.terms["off_diagonal_covariance"] < before.terms["off_diagonal_covariance"] / 2


def test_p13_fewer_than_four_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 samples over all processes, got 3"):
        E2MCRegularizer()(torch.randn(2, 3, 8))


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="`entropy_weight` must not be negative, got -1"):
        E2MCRegularizer(-1)


def test_kernel_density_estimator_is_one_option_away() -> None:
    embeddings = torch.randn(2, 32, 4, dtype=torch.float64)
    output = E2MCRegularizer(estimator="kde")(embeddings)
    expected = torch.stack([marginal_entropy(v, transform="sigmoid", estimator="kde") for v in embeddings]).mean()
    assert output.terms["marginal_entropy"].item() == pytest.approx(expected.item(), rel=1e-14)
