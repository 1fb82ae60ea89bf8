import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.regularizers.mmcr import MMCRRegularizer, nuclear_norm
from e2mc_hf.regularizers.sphere import unit_rows

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
SHAPES = [(7, 4), (4, 7), (5, 5), (6, 1), (1, 6)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "one_zero": torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(16) > 0)[:, None],
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
    "opposite_views": torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[1]], [[-1]]]),
}


def embeddings(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(num_rows: int, num_dims: int) -> Tensor:
    q, _ = torch.linalg.qr(embeddings((max(num_rows, num_dims), min(num_rows, num_dims))))
    return q if num_rows >= num_dims else q.T.contiguous()


def polar_factor(x: Tensor, rank: int) -> Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u[:, :rank] @ vh[:rank]


def gradient_of_norm(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(x), x)
    return gradient


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_value_is_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    output = MMCRRegularizer()(torch.stack([arrays["x"], arrays["y"]]).to(dtype))
    assert -output.terms["mmcr_nuclear_norm"].item() == pytest.approx(values["mmcr"], rel=tolerance)
    assert output.loss.item() == pytest.approx(0.005 * values["mmcr"], rel=tolerance)
    assert output.loss.dtype == dtype


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_value_is_the_sum_of_the_singular_values_of_the_centroids(
    num_samples: int, num_dims: int, num_views: int, seed: int
) -> None:
    z = embeddings((num_views, num_samples + 1, num_dims), seed)
    centroids = sum(F.normalize(view, dim=1) for view in z) / num_views
    expected = torch.linalg.svdvals(centroids).sum().item()
    assert MMCRRegularizer(2.0)(z).loss.item() == pytest.approx(-2 * expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_numerical_one(shape: tuple[int, int]) -> None:
    x = embeddings(shape).requires_grad_()
    assert torch.autograd.gradcheck(nuclear_norm, x)
    z = embeddings((2, shape[0] + 1, shape[1]), 1).requires_grad_()
    if shape[1] > 1:  # one dimension has the directions 1 and -1 only
        assert torch.autograd.gradcheck(lambda z: MMCRRegularizer(1.0)(z).loss, z)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_repeated_singular_values_have_the_numerical_gradient(shape: tuple[int, int]) -> None:
    x = (3 * orthonormal(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(nuclear_norm, x)
    torch.testing.assert_close(gradient_of_norm(x.detach()), orthonormal(*shape), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_missing_directions_have_the_subgradient_of_least_norm(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    # Whole numbers: of exactly this rank in float32 as well.
    left, right = embeddings((shape[0], rank)).mul(3).round(), embeddings((rank, shape[1]), 1).mul(3).round()
    x = (left @ right).to(dtype)
    torch.testing.assert_close(gradient_of_norm(x).double(), polar_factor(x, rank), rtol=0, atol=tolerance)
    expected = torch.linalg.svdvals(x.double()).sum().item()
    assert nuclear_norm(x).item() == pytest.approx(expected, rel=tolerance)


def test_float32_is_as_exact_as_a_singular_value_decomposition() -> None:
    x = embeddings((64, 200)) * torch.logspace(0, -4, 64, dtype=torch.float64)[:, None]
    single = x.float()
    exact = torch.linalg.svdvals(single.double()).sum().item()
    assert nuclear_norm(single).item() == pytest.approx(exact, rel=2e-7)
    torch.testing.assert_close(gradient_of_norm(single).double(), polar_factor(single, 64), rtol=0, atol=1e-6)


def test_zero_has_norm_and_gradient_zero() -> None:
    assert nuclear_norm(torch.zeros(4, 3)).item() == 0
    assert (gradient_of_norm(torch.zeros(4, 3)) == 0).all()


@given(st.integers(2, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_normalized_norm_lies_between_zero_and_one(num_samples: int, num_dims: int, seed: int) -> None:
    z = embeddings((2, num_samples, num_dims), seed)
    plain, normalized = MMCRRegularizer()(z), MMCRRegularizer(normalize=True)(z)
    largest = math.sqrt(num_samples * min(num_samples, num_dims))
    assert normalized.terms["mmcr_nuclear_norm"].item() == pytest.approx(
        plain.terms["mmcr_nuclear_norm"].item() / largest, rel=1e-12
    )
    assert 0 <= normalized.terms["mmcr_nuclear_norm"] <= 1 + 1e-12


@pytest.mark.parametrize("shape", [(4, 9), (9, 9)])
def test_orthonormal_samples_whose_views_agree_are_the_optimum(shape: tuple[int, int]) -> None:
    z = orthonormal(*shape).expand(2, *shape)
    assert MMCRRegularizer(1.0)(z).loss.item() == pytest.approx(-shape[0], rel=1e-12)
    assert MMCRRegularizer(1.0, normalize=True)(z).loss.item() == pytest.approx(-1, rel=1e-12)


def test_collapse_scores_the_root_of_the_batch() -> None:
    z = COLLAPSED["equal"][:1].repeat(2, 1, 1)
    assert MMCRRegularizer(1.0)(z).loss.item() == pytest.approx(-4, rel=1e-6)


def test_normalized_norm_of_a_batch_twice_is_that_of_the_batch() -> None:
    z = embeddings((2, 16, 6))
    once, twice = (MMCRRegularizer(1.0, normalize=True)(x).loss.item() for x in (z, z.repeat(1, 2, 1)))
    assert twice == pytest.approx(once, rel=1e-12)
    assert MMCRRegularizer(1.0)(z.repeat(1, 2, 1)).loss.item() == pytest.approx(
        math.sqrt(2) * MMCRRegularizer(1.0)(z).loss.item(), rel=1e-12
    )


def test_views_that_agree_score_better_than_views_that_do_not() -> None:
    z, other = embeddings((1, 16, 32)), embeddings((1, 16, 32), 1)
    agreeing, apart = (MMCRRegularizer(1.0)(torch.cat([z, x])).loss for x in (z, other))
    assert agreeing < 1.2 * apart < 0


def test_weight_zero_has_no_gradient() -> None:
    output = MMCRRegularizer(0)(embeddings((2, 12, 5)).requires_grad_())
    assert not output.loss.requires_grad
    assert output.loss.item() == 0
    assert output.terms["mmcr_nuclear_norm"] > 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([(33, 10), (10, 33)]))
@settings(max_examples=50)
def test_order_of_samples_does_not_matter(seed: int, shape: tuple[int, int]) -> None:
    z = embeddings((2, *shape), seed)
    shuffled = z[:, torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))]
    regularizer = MMCRRegularizer()
    torch.testing.assert_close(regularizer(shuffled).loss, regularizer(z).loss, rtol=1e-12, atol=0)
    single, shuffled = regularizer(z.float()).loss, regularizer(shuffled.float()).loss
    torch.testing.assert_close(shuffled, single, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_has_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = MMCRRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.abs().max() < 1
    shuffled = MMCRRegularizer()(z[:, torch.randperm(16)]).loss
    torch.testing.assert_close(shuffled, loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    z = embeddings((2, 32, 64), dtype=torch.float32)
    plain = MMCRRegularizer()(z).loss
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(MMCRRegularizer()(z).loss, plain)
    assert MMCRRegularizer()(z.to(dtype)).loss.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_a_number_is_not_hidden(value: float) -> None:
    z = embeddings((2, 6, 4))
    z[0, 2, 1] = value
    z.requires_grad_()
    loss = MMCRRegularizer()(z).loss
    assert loss.isnan()
    assert torch.autograd.grad(loss, z)[0].isnan().any()


def test_second_derivatives_are_refused() -> None:
    x = embeddings((5, 3)).requires_grad_()
    with pytest.raises(RuntimeError, match="`spectral_sum` has first derivatives only"):
        torch.autograd.grad(nuclear_norm(x), x, create_graph=True)


def test_rows_without_direction_become_zero_with_gradient_zero() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], requires_grad=True)
    u = unit_rows(z)
    (gradient,) = torch.autograd.grad(u, z, torch.ones_like(u))
    torch.testing.assert_close(u.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.032, -0.024], [0.0, 0.0], [0.0, 0.0]]))


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="`weight` must not be negative, got -1"):
        MMCRRegularizer(-1)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        MMCRRegularizer()(torch.randn(2, 1, 8))
