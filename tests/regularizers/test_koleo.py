import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.regularizers.koleo import KoLeoRegularizer, koleo_loss, nearest_neighbors

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "one_zero": torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(16) > 0)[:, None],
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


def embeddings(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equation(z: Tensor, eps: float) -> Tensor:
    """Minus the mean log distance to the nearest other sample, one pair at a time, averaged over views."""
    logarithms = []
    for view in z:
        rows = [row / row.square().sum().sqrt() for row in view]
        for i, row in enumerate(rows):
            distances = [(row - other).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
            logarithms.append((torch.stack(distances).min() + eps).log())
    return -torch.stack(logarithms).mean()


@given(st.integers(2, 10), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_value_and_gradient_are_the_equation(num_samples: int, num_dims: int, num_views: int, seed: int) -> None:
    z = embeddings((num_views, num_samples, num_dims), seed).requires_grad_()
    ours, theirs = KoLeoRegularizer(1.0, eps=1e-3)(z).loss, equation(z, 1e-3)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)
    (gradient,), (expected,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11 * max(1, expected.abs().max().item()))


def test_gradient_is_the_numerical_one() -> None:
    z = embeddings((2, 7, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: KoLeoRegularizer()(z).loss, z)


@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_neighbors_that_are_equally_near_give_the_lowest_row(
    num_samples: int, num_dims: int, extent: int, seed: int, single: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-extent, extent + 1, (num_samples, num_dims), generator=generator)
    distances = (points[:, None] - points).square().sum(dim=2)
    expected = [
        min((j for j in range(num_samples) if j != i), key=lambda j: distances[i, j]) for i in range(len(points))
    ]
    assert nearest_neighbors(points.to(torch.float32 if single else torch.float64)).tolist() == expected


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
def test_neighbors_are_exact_however_near_the_samples_are(spread: float) -> None:
    x = (torch.ones(64, 16) + spread * embeddings((64, 16))).float()
    distances = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = distances.fill_diagonal_(torch.inf).argmin(dim=1)
    assert torch.equal(nearest_neighbors(x), expected)


def test_two_samples_are_each_other_s_neighbors() -> None:
    assert nearest_neighbors(torch.zeros(2, 3)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("z", "distance"),
    [
        (torch.eye(5, dtype=torch.float64), math.sqrt(2)),
        (torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64), 2.0),
        (torch.eye(6, dtype=torch.float64) - 1 / 6, math.sqrt(12 / 5)),
    ],
)
def test_known_figures_score_minus_the_logarithm_of_their_distance(z: Tensor, distance: float) -> None:
    assert KoLeoRegularizer(1.0)(z[None]).loss.item() == pytest.approx(-math.log(distance), rel=1e-7)


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_no_sample_scores_better_than_the_regular_simplex(num_samples: int, num_dims: int, seed: int) -> None:
    loss = KoLeoRegularizer(1.0)(embeddings((1, num_samples, num_dims), seed)).loss
    assert loss >= -0.5 * math.log(2 * num_samples / (num_samples - 1)) - 1e-7


def test_gradient_descent_spreads_points_evenly_on_a_circle() -> None:
    z = embeddings((1, 8, 2)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for _ in range(300):
        optimizer.zero_grad()
        KoLeoRegularizer(1.0)(z).loss.backward()
        optimizer.step()
        schedule.step()
    even = -math.log(2 * math.sin(math.pi / 8))
    assert KoLeoRegularizer(1.0)(z).loss.item() == pytest.approx(even, abs=0.01)


def test_scale_of_a_sample_does_not_matter() -> None:
    z = embeddings((2, 12, 5))
    scaled = KoLeoRegularizer()(z * embeddings((2, 12, 1), 1).exp()).loss
    torch.testing.assert_close(scaled, KoLeoRegularizer()(z).loss, rtol=1e-12, atol=0)


def test_weight_zero_has_no_gradient() -> None:
    output = KoLeoRegularizer(0)(embeddings((2, 12, 5)).requires_grad_())
    assert not output.loss.requires_grad
    assert output.loss.item() == 0
    assert output.terms["koleo"] != 0


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=50)
def test_order_of_samples_does_not_matter(seed: int, ties: bool) -> None:
    z = embeddings((2, 33, 4), seed)
    z = z.mul(2).round() if ties else z
    shuffled = z[:, torch.randperm(33, generator=torch.Generator().manual_seed(seed))]
    regularizer = KoLeoRegularizer()
    torch.testing.assert_close(regularizer(shuffled).loss, regularizer(z).loss, rtol=1e-12, atol=1e-13)
    single, shuffled = regularizer(z.float()).loss, regularizer(shuffled.float()).loss
    torch.testing.assert_close(shuffled, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_has_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = KoLeoRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("case", ["equal", "zero", "duplicated"])
def test_pairs_at_distance_zero_score_eps_and_have_no_gradient(case: str) -> None:
    z = COLLAPSED[case].double().requires_grad_()
    loss = KoLeoRegularizer(1.0)(z).loss
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-12)
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_gradient_of_a_near_pair_is_exact_in_float32() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(koleo_loss(x), x)
    # Each of the near two is the other's neighbor: 2/3 of 1/distance; the third adds its own pull on the lower row.
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, -2 / 3 / (1e-4 + 1e-8)]), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_give_the_same_gradient_however_the_batch_lies_in_memory(dtype: torch.dtype) -> None:
    # Gathered from several processes, the samples are not next to each other.
    z = embeddings((2, 64, 4)).mul(2).round().to(dtype)
    gathered = z.movedim(1, 0).contiguous().movedim(0, 1)
    gradients = [torch.autograd.grad(KoLeoRegularizer()(x.requires_grad_()).loss, x)[0] for x in (z, gathered)]
    assert not gathered.is_contiguous()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (gradients[0] - gradients[1]).abs().max() <= tolerance * gradients[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    z = embeddings((2, 32, 64), dtype=torch.float32)
    plain = KoLeoRegularizer()(z).loss
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(KoLeoRegularizer()(z).loss, plain)
    assert KoLeoRegularizer()(z.to(dtype)).loss.dtype == torch.float32


def test_a_sample_that_is_not_a_number_is_not_hidden() -> None:
    z = embeddings((2, 6, 4))
    z[0, 2, 1] = torch.nan
    assert KoLeoRegularizer()(z).loss.isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "`weight` must not be negative, got -1"),
        ({"eps": 0}, "`eps` must be positive, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KoLeoRegularizer(**options)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        KoLeoRegularizer()(torch.randn(2, 1, 8))
