import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.regularizers.covariance import off_diagonal_covariance

shapes = st.tuples(st.integers(2, 40), st.integers(1, 40))


def sample(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x @ torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64) + 3).to(dtype)


def equation(x: Tensor, debias: bool = False) -> Tensor:
    covariance = torch.atleast_2d(torch.cov(x.T))
    off_diagonal = covariance - torch.diag(torch.diag(covariance))
    value = off_diagonal.square().sum()
    if debias:
        variance = torch.diag(covariance)
        value = value - (variance.sum() ** 2 - variance.square().sum()) / (x.shape[0] - 1)
    return value / x.shape[1]


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from(["auto", "feature", "gram"]), st.booleans())
def test_every_form_is_the_equation_on_value_and_gradient(
    shape: tuple[int, int], seed: int, form: str, debias: bool
) -> None:
    x = sample(shape, seed).requires_grad_()
    ours, theirs = off_diagonal_covariance(x, form=form, debias=debias), equation(x, debias)
    scale = equation(x).item() + torch.cov(x.detach().T).square().sum().item()
    assert (ours - theirs).abs().item() <= 1e-12 * scale
    (gradient,), (expected,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * max(scale, expected.abs().max().item()))


@pytest.mark.parametrize("form", ["feature", "gram"])
@pytest.mark.parametrize("debias", [False, True])
def test_gradient_is_the_numerical_one(form: str, debias: bool) -> None:
    x = sample((7, 9), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: off_diagonal_covariance(x, form=form, debias=debias), x)


def test_products_cut_into_blocks_are_whole() -> None:
    x = sample((600, 700), 0)
    torch.testing.assert_close(off_diagonal_covariance(x, form="gram"), equation(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(off_diagonal_covariance(x, form="feature"), equation(x), rtol=1e-12, atol=0)


def test_float32_forms_agree() -> None:
    for shape in ((64, 512), (512, 64)):
        x = sample(shape, 0, torch.float32) / 10
        gram, feature = (off_diagonal_covariance(x, form=form) for form in ("gram", "feature"))
        torch.testing.assert_close(gram, feature, rtol=1e-5, atol=0)


def test_gram_form_allocates_no_feature_matrix() -> None:
    num_samples, num_dims = 8, 4096
    x = torch.randn(num_samples, num_dims, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        off_diagonal_covariance(x).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 4 * num_dims**2 / 10


def test_debiased_value_of_independent_coordinates_is_zero_on_average() -> None:
    draws = torch.rand(200, 32, 64, dtype=torch.float64)
    debiased = torch.stack([off_diagonal_covariance(x, debias=True) for x in draws])
    plain = torch.stack([off_diagonal_covariance(x) for x in draws])
    assert debiased.mean().abs() < 4 * debiased.std() / len(draws) ** 0.5
    # METHOD d.3: (D-1)/144/(N-1) is the floor for uniform coordinates.
    assert plain.mean().item() == pytest.approx(63 / 144 / 31, rel=0.02)


def test_uncorrelated_coordinates_score_zero_and_copies_their_variance() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert off_diagonal_covariance(x).item() == pytest.approx(0, abs=1e-15)
    copies = x[:, :1].repeat(1, 2)
    assert off_diagonal_covariance(copies).item() == pytest.approx(2 * (4 / 3) ** 2 / 2)


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        off_diagonal_covariance(torch.ones(1, 3))


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    x = sample((7, 9), 0).requires_grad_()
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(off_diagonal_covariance(x), x, create_graph=True)
