import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.regularizers.uniformity import UniformityRegularizer, log_mean_potential

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "one_zero": torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(16) > 0)[:, None],
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


def embeddings(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def simplex(num_samples: int) -> Tensor:
    """Corners of a regular simplex around 0."""
    return torch.eye(num_samples, dtype=torch.float64) - 1 / num_samples


def equation(z: Tensor, temperature: float) -> Tensor:
    """The mean over views of the logarithm of the mean over pairs, one pair at a time."""
    values = []
    for view in z:
        rows = [row / row.square().sum().sqrt() for row in view]
        pairs = [(rows[i] - rows[j]).square().sum() for i in range(len(rows)) for j in range(i + 1, len(rows))]
        values.append(torch.stack([(-temperature * pair).exp() for pair in pairs]).mean().log())
    return torch.stack(values).mean()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_value_is_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    output = UniformityRegularizer()(arrays["x"][None].to(dtype))
    assert output.terms["uniformity"].item() == pytest.approx(values["uniformity.t2"], rel=tolerance)
    assert output.loss.item() == pytest.approx(0.5 * values["uniformity.t2"], rel=tolerance)
    assert output.loss.dtype == dtype


@given(st.integers(2, 10), st.integers(1, 6), st.integers(1, 3), st.floats(0.1, 4.0), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_value_and_gradient_are_the_equation(
    num_samples: int, num_dims: int, num_views: int, temperature: float, seed: int
) -> None:
    z = embeddings((num_views, num_samples, num_dims), seed).requires_grad_()
    ours, theirs = UniformityRegularizer(1.0, temperature=temperature)(z).loss, equation(z, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)
    (gradient,), (expected,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    scale = 1 / z.detach().norm(dim=2).min().item()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * scale)


def test_views_are_averaged() -> None:
    z = embeddings((3, 12, 5))
    alone = [UniformityRegularizer(1.0)(view[None]).loss for view in z]
    torch.testing.assert_close(UniformityRegularizer(1.0)(z).loss, torch.stack(alone).mean(), rtol=1e-14, atol=0)


def test_gradient_is_the_numerical_one() -> None:
    x = embeddings((7, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_mean_potential(x, 0.7), x)
    assert torch.autograd.gradcheck(lambda x: UniformityRegularizer()(x[None]).loss, x)


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_no_sample_lies_beyond_the_regular_simplex_or_collapse(num_samples: int, num_dims: int, seed: int) -> None:
    value = UniformityRegularizer(1.0)(embeddings((1, num_samples, num_dims), seed)).loss
    assert -4 * num_samples / (num_samples - 1) - 1e-12 <= value <= 0


@pytest.mark.parametrize("num_samples", [2, 3, 17])
def test_the_regular_simplex_is_the_optimum_and_stationary(num_samples: int) -> None:
    z = simplex(num_samples)[None].requires_grad_()
    loss = UniformityRegularizer(1.0, temperature=3.0)(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(-6 * num_samples / (num_samples - 1), rel=1e-13)
    assert gradient.abs().max() < 1e-13


def test_a_sharp_potential_does_not_underflow() -> None:
    orthogonal = torch.eye(8)
    assert log_mean_potential(orthogonal, 1e4).item() == pytest.approx(-2e4, rel=1e-6)


def test_scale_of_a_sample_does_not_matter() -> None:
    z = embeddings((2, 12, 5))
    scaled = UniformityRegularizer()(z * embeddings((2, 12, 1), 1).exp()).loss
    torch.testing.assert_close(scaled, UniformityRegularizer()(z).loss, rtol=1e-13, atol=0)


def test_gradient_descent_reaches_the_simplex() -> None:
    z = embeddings((1, 5, 8)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        UniformityRegularizer()(z).loss.backward()
        optimizer.step()
    assert UniformityRegularizer(1.0)(z).loss.item() == pytest.approx(-5, abs=1e-4)


def test_weight_zero_has_no_gradient() -> None:
    output = UniformityRegularizer(0)(embeddings((2, 12, 5)).requires_grad_())
    assert not output.loss.requires_grad
    assert output.loss.item() == 0
    assert output.terms["uniformity"] < 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_order_of_samples_does_not_matter(seed: int) -> None:
    z = embeddings((2, 33, 10), seed)
    shuffled = z[:, torch.randperm(33, generator=torch.Generator().manual_seed(seed))]
    regularizer = UniformityRegularizer()
    torch.testing.assert_close(regularizer(shuffled).loss, regularizer(z).loss, rtol=1e-12, atol=0)
    single, shuffled = regularizer(z.float()).loss, regularizer(shuffled.float()).loss
    torch.testing.assert_close(shuffled, single, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_has_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = UniformityRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.abs().max() < 100
    if case in ("equal", "zero"):
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert gradient.abs().max() < 1e-6


def test_half_as_many_directions_score_the_logarithm_of_how_often_they_meet() -> None:
    # 4 orthogonal directions, each twice: of 28 pairs 4 are at distance 0 and 24 at sqrt(2).
    z = torch.eye(4, dtype=torch.float64).repeat(2, 1)[None]
    expected = math.log((4 + 24 * math.exp(-4)) / 28)
    assert UniformityRegularizer(1.0)(z).loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    z = embeddings((2, 32, 64), dtype=torch.float32)
    plain = UniformityRegularizer()(z).loss
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(UniformityRegularizer()(z).loss, plain)
    assert UniformityRegularizer()(z.to(dtype)).loss.dtype == torch.float32


def test_a_sample_that_is_not_a_number_is_not_hidden() -> None:
    z = embeddings((1, 6, 4))
    z[0, 2, 1] = torch.nan
    assert UniformityRegularizer()(z).loss.isnan()


def test_second_derivatives_are_refused() -> None:
    z = F.normalize(embeddings((5, 3)), dim=1).requires_grad_()
    with pytest.raises(RuntimeError, match="`log_mean_potential` has first derivatives only"):
        torch.autograd.grad(log_mean_potential(z), z, create_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "`weight` must not be negative, got -1"),
        ({"temperature": 0}, "`temperature` must be positive and finite, got 0"),
        ({"temperature": math.inf}, "`temperature` must be positive and finite, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformityRegularizer(**options)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        UniformityRegularizer()(torch.randn(2, 1, 8))
