from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.regularizers.vcreg import VCRegRegularizer, check_space, variance_hinge

CASES = ["more_samples", "more_dims", "wide_scale"]
SPACES = ["embeddings", "hypersphere"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


def embeddings(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def score(z: Tensor, space: str) -> tuple[float, float]:
    """Both terms as their equations say, one dimension or pair at a time; eps in units of the squared target."""
    num_dims = z.shape[2]
    target = 1.0 if space == "embeddings" else num_dims**-0.5
    variance, covariance = 0.0, 0.0
    for view in z if space == "embeddings" else torch.nn.functional.normalize(z, dim=2):
        table = torch.atleast_2d(torch.cov(view.T))
        for j in range(num_dims):
            std = float(table[j, j] + 1e-4 * target**2) ** 0.5
            variance += max(0.0, target - std) / num_dims / len(z)
            covariance += sum(float(table[j, k]) ** 2 for k in range(num_dims) if k != j) / num_dims
    return variance, covariance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_terms_are_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    output = VCRegRegularizer(25, 1)(torch.stack([arrays["x"], arrays["y"]]).to(dtype))
    variance, covariance = values["vicreg.std_loss"], values["vicreg.cov_loss"]
    assert output.terms["vcreg_variance"].item() == pytest.approx(variance, rel=tolerance)
    assert output.terms["vcreg_covariance"].item() == pytest.approx(covariance, rel=tolerance)
    assert output.loss.item() == pytest.approx(25 * variance + covariance, rel=tolerance)
    assert output.loss.dtype == dtype


@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 3), st.sampled_from(SPACES), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_terms_are_the_equations(num_samples: int, num_dims: int, num_views: int, space: str, seed: int) -> None:
    z = embeddings((num_views, num_samples, num_dims), seed) * 0.7 + 1
    terms = VCRegRegularizer(space=space)(z).terms
    variance, covariance = score(z, space)
    assert terms["vcreg_variance"].item() == pytest.approx(variance, rel=1e-10, abs=1e-14)
    assert terms["vcreg_covariance"].item() == pytest.approx(covariance, rel=1e-10, abs=1e-14)


def test_loss_and_gradient_are_those_of_vicreg_without_invariance() -> None:
    z = embeddings((2, 24, 8)).requires_grad_()
    objective = VICReg(4, 8, invariance_weight=0.0, variance_weight=3.0, covariance_weight=0.5)
    expected, loss = objective.score(z).loss, VCRegRegularizer(3.0, 0.5)(z).loss
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    (gradient,), (theirs,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, theirs, rtol=1e-12, atol=1e-16)


def test_defaults_are_those_of_table_3() -> None:
    assert VCRegRegularizer().weights == {"vcreg_variance": 0.1, "vcreg_covariance": 0.001}


def test_uncorrelated_dimensions_of_unit_variance_score_zero() -> None:
    design = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    terms = VCRegRegularizer()(torch.stack([design, -design])).terms
    assert terms["vcreg_variance"].item() == 0
    assert terms["vcreg_covariance"].item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize(("space", "target"), [("embeddings", 1.0), ("hypersphere", 6**-0.5)])
@pytest.mark.parametrize("case", ["equal", "zero"])
def test_collapse_scores_the_whole_target_but_for_eps(space: str, target: float, case: str) -> None:
    terms = VCRegRegularizer(space=space)(COLLAPSED[case].double()).terms
    assert terms["vcreg_variance"].item() == pytest.approx(target * (1 - 0.01), rel=1e-12)
    assert terms["vcreg_covariance"].item() == pytest.approx(0, abs=1e-30)


def test_hypersphere_sees_no_scale_and_scores_a_uniform_sample_near_zero() -> None:
    z = embeddings((2, 4000, 16))
    regularizer = VCRegRegularizer(space="hypersphere")
    scales = embeddings((2, 4000, 1), 1).exp()
    for name, term in regularizer(z * scales).terms.items():
        torch.testing.assert_close(term, regularizer(z).terms[name], rtol=1e-9, atol=1e-15)
    assert regularizer(z).terms["vcreg_variance"] < 0.01 * 16**-0.5


def test_hinge_of_a_rescaled_sample_is_the_rescaled_hinge() -> None:
    x = 0.5 * embeddings((20, 7))
    expected = 0.01 * variance_hinge(x)
    torch.testing.assert_close(variance_hinge(0.01 * x, target=0.01), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights", [(2.0, 0.0), (0.0, 2.0)])
def test_a_term_of_weight_zero_is_logged_but_takes_no_part_in_the_gradient(weights: tuple[float, float]) -> None:
    z = (0.5 * embeddings((2, 12, 5))).requires_grad_()
    output = VCRegRegularizer(*weights)(z)
    (gradient,) = torch.autograd.grad(output.loss, z)
    name, other = sorted(output.terms, key=lambda name: name == "vcreg_covariance", reverse=weights[0] == 0)
    alone = VCRegRegularizer(*weights)
    assert output.loss.item() == 2 * output.terms[name].item()
    assert output.terms[other] > 0
    shift = 1e-6 * gradient
    assert (alone(z + shift).terms[name] - output.terms[name]).item() == pytest.approx(
        (gradient * shift).sum().item() / 2, rel=1e-3
    )


def test_weight_zero_has_no_gradient() -> None:
    z = embeddings((2, 12, 5)).requires_grad_()
    output = VCRegRegularizer(0, 0)(z)
    assert not output.loss.requires_grad
    assert output.loss.item() == 0
    assert output.terms["vcreg_covariance"] > 0


@pytest.mark.parametrize("space", SPACES)
def test_gradient_is_the_numerical_one(space: str) -> None:
    z = (0.5 * embeddings((2, 7, 4))).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: VCRegRegularizer(3, 2, space=space)(z).loss, z)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SPACES))
@settings(max_examples=50)
def test_order_of_samples_does_not_matter(seed: int, space: str) -> None:
    z = 0.5 * embeddings((2, 33, 10), seed)
    shuffled = z[:, torch.randperm(33, generator=torch.Generator().manual_seed(seed))]
    regularizer = VCRegRegularizer(space=space)
    torch.testing.assert_close(regularizer(shuffled).loss, regularizer(z).loss, rtol=1e-12, atol=0)
    single, shuffled = regularizer(z.float()).loss, regularizer(shuffled.float()).loss
    torch.testing.assert_close(shuffled, single, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_has_finite_loss_and_gradient(case: str, space: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = VCRegRegularizer(space=space)(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    z = embeddings((2, 32, 64), dtype=torch.float32)
    for space in SPACES:
        plain = VCRegRegularizer(space=space)(z).loss
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(VCRegRegularizer(space=space)(z).loss, plain)
        assert VCRegRegularizer(space=space)(z.to(dtype)).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_weight": -1}, "`variance_weight` must not be negative, got -1"),
        ({"covariance_weight": -2}, "`covariance_weight` must not be negative, got -2"),
        ({"eps": 0}, "`eps` must be positive, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VCRegRegularizer(**options)


def test_unknown_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="`space` must be embeddings or hypersphere, got 'sphere'"):
        check_space("sphere")


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        VCRegRegularizer()(torch.randn(2, 1, 8))
