import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.regularizers.vne import VNERegularizer, von_neumann_entropy

SHAPES = [(7, 4), (4, 7), (5, 5), (6, 1), (2, 6)]

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "one_zero": torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(16) > 0)[:, None],
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
    "repeated_eigenvalues": torch.eye(6).repeat(2, 3, 1),
}


def embeddings(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equation(z: Tensor) -> float:
    """Minus the sum of p log p over the eigenvalues p of the D x D autocorrelation, averaged over views."""
    entropies = []
    for view in F.normalize(z, dim=2):
        autocorrelation = sum(torch.outer(row, row) for row in view) / len(view)
        entropies.append(-sum(p * math.log(p) for p in torch.linalg.eigvalsh(autocorrelation).tolist() if p > 1e-14))
    return sum(entropies) / len(entropies)


@given(st.integers(2, 16), st.integers(1, 16), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_value_is_the_equation(num_samples: int, num_dims: int, num_views: int, seed: int) -> None:
    z = embeddings((num_views, num_samples, num_dims), seed)
    output = VNERegularizer(2.0)(z)
    assert output.terms["vne_entropy"].item() == pytest.approx(equation(z), rel=1e-11, abs=1e-11)
    assert output.loss.item() == pytest.approx(-2 * equation(z), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_numerical_one(shape: tuple[int, int]) -> None:
    assert torch.autograd.gradcheck(von_neumann_entropy, embeddings(shape).requires_grad_())
    z = embeddings((2, *shape), 1).requires_grad_()
    if shape[1] > 1:  # one dimension has the directions 1 and -1 only
        assert torch.autograd.gradcheck(lambda z: VNERegularizer()(z).loss, z)


@pytest.mark.parametrize("rows", [torch.eye(4), torch.eye(4).repeat(2, 1), torch.eye(4)[:, :3], torch.eye(3, 5) * 2])
def test_repeated_eigenvalues_have_the_numerical_gradient(rows: Tensor) -> None:
    assert torch.autograd.gradcheck(von_neumann_entropy, rows.double().requires_grad_())


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("rank", [1, 3])
def test_missing_directions_are_no_obstacle(shape: tuple[int, int], rank: int) -> None:
    # Along a direction already there the entropy is smooth; into a missing one its slope is 0 by the equation.
    left, right = embeddings((shape[0], rank)), embeddings((rank, shape[1]), 1)
    x = (left @ right).requires_grad_()
    (gradient,) = torch.autograd.grad(von_neumann_entropy(x), x)
    inside = left @ embeddings((rank, rank), 2) @ right
    step = 1e-6
    with torch.no_grad():
        slope = (von_neumann_entropy(x + step * inside) - von_neumann_entropy(x - step * inside)) / (2 * step)
    assert (gradient * inside).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    outside = torch.linalg.svd(x.detach())[2][rank:]
    if len(outside):
        assert (gradient @ outside.T).abs().max() < 1e-6


@pytest.mark.parametrize(("num_samples", "num_dims"), [(6, 10), (10, 10), (20, 10)])
def test_an_orthonormal_basis_is_the_optimum_and_stationary(num_samples: int, num_dims: int) -> None:
    q, _ = torch.linalg.qr(embeddings((num_dims, num_dims)))
    z = q[torch.arange(num_samples) % num_dims][None].requires_grad_()
    output = VNERegularizer()(z)
    (gradient,) = torch.autograd.grad(output.loss, z)
    assert output.terms["vne_entropy"].item() == pytest.approx(math.log(min(num_samples, num_dims)), rel=1e-13)
    assert gradient.abs().max() < 1e-13


@given(st.integers(2, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_entropy_lies_between_zero_and_the_logarithm_of_the_rank(num_samples: int, num_dims: int, seed: int) -> None:
    entropy = VNERegularizer()(embeddings((1, num_samples, num_dims), seed)).terms["vne_entropy"]
    assert -1e-13 <= entropy <= math.log(min(num_samples, num_dims)) + 1e-13


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(6, 80))
@settings(max_examples=50)
def test_clusters_in_orthogonal_directions_score_the_entropy_of_their_sizes(sizes: list[int], num_dims: int) -> None:
    clusters = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).repeat(2)
    z = torch.eye(num_dims, dtype=torch.float64)[clusters]
    signs = torch.where(torch.arange(len(z)) % 2 == 0, 1.0, -1.0)[:, None]
    expected = -sum(s / sum(sizes) * math.log(s / sum(sizes)) for s in sizes)
    entropy = VNERegularizer()((z * signs)[None]).terms["vne_entropy"]
    assert entropy.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", ["equal", "rank_one", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_line_scores_zero_with_gradient_zero(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    output = VNERegularizer()(z)
    assert output.terms["vne_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(output.loss, z)[0].abs().max() < 1e-5


@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_has_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = VNERegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


def test_float32_agrees_with_float64() -> None:
    for shape in ((2, 64, 200), (2, 200, 64)):
        z = embeddings(shape, dtype=torch.float32).requires_grad_()
        exact = z.detach().double().requires_grad_()
        losses = VNERegularizer()(z).loss, VNERegularizer()(exact).loss
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        (gradient,), (expected,) = torch.autograd.grad(losses[0], z), torch.autograd.grad(losses[1], exact)
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradient_descent_raises_the_effective_number_of_dimensions() -> None:
    z = (embeddings((1, 32, 1)) + 0.1 * embeddings((1, 32, 8), 1)).requires_grad_()
    before = VNERegularizer()(z).terms["vne_entropy"]
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        VNERegularizer()(z).loss.backward()
        optimizer.step()
    assert before < 0.5
    assert VNERegularizer()(z).terms["vne_entropy"].item() == pytest.approx(math.log(8), abs=1e-3)


def test_weight_zero_has_no_gradient() -> None:
    output = VNERegularizer(0)(embeddings((2, 12, 5)).requires_grad_())
    assert not output.loss.requires_grad
    assert output.loss.item() == 0
    assert output.terms["vne_entropy"] > 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([(33, 10), (10, 33)]))
@settings(max_examples=50)
def test_order_of_samples_does_not_matter(seed: int, shape: tuple[int, int]) -> None:
    z = embeddings((2, *shape), seed)
    shuffled = z[:, torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))]
    regularizer = VNERegularizer()
    torch.testing.assert_close(regularizer(shuffled).loss, regularizer(z).loss, rtol=1e-12, atol=0)
    single, shuffled = regularizer(z.float()).loss, regularizer(shuffled.float()).loss
    torch.testing.assert_close(shuffled, single, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    z = embeddings((2, 32, 64), dtype=torch.float32)
    plain = VNERegularizer()(z).loss
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(VNERegularizer()(z).loss, plain)
    assert VNERegularizer()(z.to(dtype)).loss.dtype == torch.float32


def test_a_sample_that_is_not_a_number_is_not_hidden() -> None:
    z = embeddings((2, 6, 4))
    z[0, 2, 1] = torch.nan
    assert VNERegularizer()(z).loss.isnan()


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="`weight` must not be negative, got -1"):
        VNERegularizer(-1)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        VNERegularizer()(torch.randn(2, 1, 8))
