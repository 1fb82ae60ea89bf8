import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.directions import random_directions
from e2mc_hf.regularizers.sigreg import SIGRegRegularizer, epps_pulley

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}
seeds = st.integers(0, 2**32 - 1)


def normal_quantiles(num_samples: int) -> Tensor:
    return torch.special.ndtri((torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples)


def all_knots(samples: list[float], num_knots: int) -> float:
    """The trapezoidal rule on every knot from -5 to 5, as it is written."""
    spacing = 10 / (num_knots - 1)
    total = 0.0
    for knot in range(num_knots):
        t = -5 + knot * spacing
        phi = math.exp(-t * t / 2)
        distance = abs(sum(cmath.exp(1j * t * x) for x in samples) / len(samples) - phi) ** 2
        total += spacing * (0.5 if knot in (0, num_knots - 1) else 1) * distance * phi
    return len(samples) * total


def whole_line(x: Tensor) -> float:
    """The integral over all t in closed form: its terms are integrals of Gaussians."""
    pairs = torch.exp(-((x[:, None] - x[None]) ** 2) / 2).mean()
    singles = torch.exp(-(x**2) / 4).mean()
    value = math.sqrt(2 * math.pi) * (pairs - math.sqrt(2) * singles + 1 / math.sqrt(3))
    return len(x) * value.item()


@given(seeds, st.integers(2, 30), st.sampled_from([3, 5, 17]), st.floats(0.1, 5))
@settings(max_examples=50)
def test_statistic_is_the_quadrature_on_all_knots(seed: int, num_samples: int, num_knots: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(3, num_samples, generator=generator, dtype=torch.float64)
    expected = [all_knots(row, num_knots) for row in x.tolist()]
    assert epps_pulley(x, num_knots).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_quadrature_on_17_knots_is_the_integral() -> None:
    # Of samples further than 10.05 apart it is not: there the knots, 0.625 apart, repeat themselves.
    for shift, scale in ((0, 1), (0.5, 1), (3, 1), (-1, 0.3)):
        x = shift + scale * torch.randn(50, dtype=torch.float64)
        assert epps_pulley(x[None]).item() == pytest.approx(whole_line(x), rel=1e-3, abs=1e-4)


def test_normal_quantiles_score_nearly_zero_and_other_samples_do_not() -> None:
    x = normal_quantiles(512)
    assert epps_pulley(x[None]).item() < 1e-3
    for other in (x + 0.3, 1.3 * x, x.sign(), torch.linspace(-1.7, 1.7, 512, dtype=torch.float64)):
        assert epps_pulley(other[None]).item() > 0.5


@pytest.mark.parametrize("num_samples", [32, 512])
def test_random_normal_samples_score_the_same_in_a_batch_of_any_size(num_samples: int) -> None:
    x = torch.randn(1000, num_samples)
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert epps_pulley(x).mean().item() == pytest.approx(expected, abs=0.08)


def test_term_is_the_mean_over_views_and_directions_of_the_step() -> None:
    z = torch.randn(2, 20, 6, dtype=torch.float64)
    regularizer = SIGRegRegularizer(0.5, num_directions=7, num_knots=5, seed=3)
    regularizer.set_progress(Progress(step=11))
    directions = random_directions(6, 7, 3, 11, z)
    scores = [all_knots((view @ a).tolist(), 5) for view in z for a in directions]
    output = regularizer(z)
    assert output.terms["sigreg"].item() == pytest.approx(sum(scores) / 14, rel=1e-10)
    assert output.loss.item() == pytest.approx(0.5 * sum(scores) / 14, rel=1e-10)


@given(seeds, st.integers(0, 2**40), st.integers(1, 20))
@settings(max_examples=50)
def test_directions_are_unit_vectors_of_seed_and_step(seed: int, step: int, num_dims: int) -> None:
    like = torch.zeros((), dtype=torch.float64)
    directions = random_directions(num_dims, 5, seed, step, like)
    assert (directions.norm(dim=1) - 1).abs().max() <= 1e-12
    assert torch.equal(directions, random_directions(num_dims, 5, seed, step, like))
    if num_dims > 1:  # in one dimension there are but two
        assert not torch.equal(directions, random_directions(num_dims, 5, seed, step + 1, like))
        assert not torch.equal(directions, random_directions(num_dims, 5, seed + 1, step, like))


def test_directions_favor_no_axis_and_are_alike_in_both_precisions() -> None:
    directions = random_directions(4, 20_000, 0, 0, torch.zeros((), dtype=torch.float64))
    assert (directions.mean(dim=0)).abs().max() < 0.02
    assert (directions.t() @ directions / 20_000 - torch.eye(4) / 4).abs().max() < 0.01
    single = random_directions(4, 20_000, 0, 0, torch.zeros(()))
    assert (single - directions).abs().max() < 1e-6


def test_global_random_state_is_neither_read_nor_moved() -> None:
    z, regularizer = torch.randn(1, 16, 4), SIGRegRegularizer(num_directions=8)
    torch.manual_seed(1)
    first = regularizer(z).loss
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(regularizer(z).loss, first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


def test_gradient_is_the_numerical_one() -> None:
    z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    regularizer = SIGRegRegularizer(num_directions=4)
    assert torch.autograd.gradcheck(lambda z: regularizer(z).loss, z)


def test_blocks_of_directions_do_not_show() -> None:
    x = torch.randn(300, 700).requires_grad_()
    part = x.detach()[290:].clone().requires_grad_()
    assert torch.equal(epps_pulley(x)[290:], epps_pulley(part))
    gradients = [torch.autograd.grad(epps_pulley(y).sum(), y)[0] for y in (x, part)]
    assert torch.equal(gradients[0][290:], gradients[1])


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    x = torch.randn(2, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(epps_pulley(x).sum(), x, create_graph=True)


def test_descent_makes_the_embeddings_standard_normal() -> None:
    z = (torch.rand(1, 128, 1) + torch.rand(1, 128, 3) * torch.tensor([0.5, 1.0, 2.0])).requires_grad_()
    regularizer, optimizer = SIGRegRegularizer(num_directions=32), torch.optim.Adam([z], lr=0.08)
    for step in range(100):
        regularizer.set_progress(Progress(step=step))
        optimizer.zero_grad()
        regularizer(z).loss.backward()
        optimizer.step()
    fresh = random_directions(3, 50, 1, 0, z)
    distances = [stats.kstest((z.detach()[0] @ a).numpy(), "norm").statistic for a in fresh]
    assert max(distances) < 0.12  # 0.73 at the start; 128 normal samples have 0.12 at the 5 % point


@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_gives_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = SIGRegRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_the_samples_does_not_matter(dtype: torch.dtype, tolerance: float) -> None:
    z = torch.randn(2, 64, 8, dtype=dtype)
    losses = [SIGRegRegularizer()(x).loss.item() for x in (z, z[:, torch.randperm(64)])]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_term_is_float32_under_autocast() -> None:
    z = torch.randn(2, 64, 8)
    plain = SIGRegRegularizer()(z).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = SIGRegRegularizer()(z).loss
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_weight_of_zero_leaves_no_gradient() -> None:
    assert not SIGRegRegularizer(0)(torch.randn(2, 16, 4, requires_grad=True)).loss.requires_grad


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"weight": -1.0}, "`weight` must not be negative, got -1"),
        ({"num_directions": 0}, "`num_directions` must be at least 1, got 0"),
        ({"num_knots": 16}, "`num_knots` must be odd and at least 3, got 16"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            SIGRegRegularizer(**options)
