import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.directions import random_directions
from e2mc_hf.regularizers.visreg import VISRegRegularizer, normal_quantiles, sliced_wasserstein

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 5), st.floats(0.2, 3))
@settings(max_examples=50)
def test_terms_are_the_equations_worked_in_loops(seed: int, num_samples: int, num_dims: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, num_samples, num_dims, generator=generator, dtype=torch.float64) + 0.5
    regularizer = VISRegRegularizer(2, 3, 5, num_directions=4, seed=1)
    regularizer.set_progress(Progress(step=7))
    directions = random_directions(num_dims, 4, 1, 7, z)
    plain = [torch.special.ndtri(torch.tensor(i / (num_samples + 1))).item() for i in range(1, num_samples + 1)]
    size = math.sqrt(sum(q * q for q in plain) / num_samples)
    center = spread = shape = 0.0
    for view in z:
        mean = view.sum(dim=0) / num_samples
        std = (((view - mean) ** 2).sum(dim=0) / num_samples + 1e-8) ** 0.5
        center += (mean**2).sum().item() / num_dims / 2
        spread += ((std - 1) ** 2).sum().item() / num_dims / 2
        for a in directions:
            ranked = sorted(((view - mean) / std @ a).tolist())
            squares = [(x - q / size) ** 2 for x, q in zip(ranked, plain, strict=True)]
            shape += sum(squares) / num_samples / 4 / 2
    output = regularizer(z)
    assert output.terms["visreg_center"].item() == pytest.approx(center, rel=1e-10)
    assert output.terms["visreg_scale"].item() == pytest.approx(spread, rel=1e-10)
    assert output.terms["visreg_shape"].item() == pytest.approx(shape, rel=1e-6)  # ndtri of float32 above
    assert output.loss.item() == pytest.approx(2 * center + 3 * spread + 5 * shape, rel=1e-6)


@pytest.mark.parametrize("num_samples", [2, 3, 64, 513])
def test_normal_quantiles_are_the_optimum(num_samples: int) -> None:
    z = normal_quantiles(num_samples)[None, torch.randperm(num_samples), None].clone().requires_grad_()
    output = VISRegRegularizer(num_directions=4)(z)
    (gradient,) = torch.autograd.grad(output.loss, z)
    assert output.loss.item() < 1e-14
    assert gradient.abs().max() < 1e-7


def test_normal_embeddings_score_lower_than_others_of_the_same_covariance() -> None:
    normal = torch.randn(1, 512, 2)
    others = {
        "uniform": (torch.rand(1, 512, 2) - 0.5) * math.sqrt(12),
        "signs": torch.randn(1, 512, 2).sign(),
        "heavy": torch.randn(1, 512, 2) * (0.5 + 1.5 * (torch.rand(1, 512, 1) < 0.2)),
    }
    shape = VISRegRegularizer()(normal).terms["visreg_shape"]
    assert all(VISRegRegularizer()(other).terms["visreg_shape"] > 2 * shape for other in others.values())


def test_scale_and_shape_each_pull_on_their_own_part() -> None:
    # In one dimension the scale is z - mu; the shape has no gradient along it where the order fits the quantiles.
    z = (2.5 * normal_quantiles(64)[None, :, None] + 3).requires_grad_()
    (shape,) = torch.autograd.grad(VISRegRegularizer(0, 0, 1, num_directions=2)(z).loss, z)
    (scale,) = torch.autograd.grad(VISRegRegularizer(0, 1, 0, num_directions=2)(z).loss, z)
    (center,) = torch.autograd.grad(VISRegRegularizer(1, 0, 0, num_directions=2)(z).loss, z)
    centered = z.detach() - 3
    assert shape.abs().max() < 1e-8
    assert (scale * centered).sum().item() == pytest.approx(2 * 1.5 * 2.5, rel=1e-6)
    assert center.sum().item() == pytest.approx(2 * 3)


def test_collapsed_embeddings_are_pulled_apart() -> None:
    z = torch.full((1, 64, 4), 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(VISRegRegularizer()(z).loss, z)
    apart = z.detach() - 1e-2 * gradient / gradient.abs().max()
    assert apart.std(dim=1).min() > 1e-4
    assert VISRegRegularizer()(z).terms["visreg_shape"].item() == pytest.approx(1)
    assert VISRegRegularizer()(apart).terms["visreg_shape"] < 0.5


def test_gradient_is_the_numerical_one_of_each_part() -> None:
    # Only the shape holds sigma fixed: the numerical derivative must not move it.
    z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    directions = random_directions(3, 4, 0, 0, z)
    assert torch.autograd.gradcheck(lambda z: VISRegRegularizer(2, 3, 0, num_directions=2)(z).loss, z)
    assert torch.autograd.gradcheck(lambda z: sliced_wasserstein(z[0], directions), z)


def test_descent_makes_the_embeddings_standard_normal() -> None:
    z = (torch.rand(1, 128, 3) * torch.tensor([0.5, 2.0, 4.0]) + 1).requires_grad_()
    regularizer, optimizer = VISRegRegularizer(num_directions=32), torch.optim.Adam([z], lr=0.1)
    for step in range(100):
        regularizer.set_progress(Progress(step=step))
        optimizer.zero_grad()
        regularizer(z).loss.backward()
        optimizer.step()
    assert z.mean(dim=1).abs().max() < 0.1
    assert (torch.cov(z.detach()[0].t()) - torch.eye(3)).abs().max() < 0.2
    assert VISRegRegularizer()(z).terms["visreg_shape"] < 0.02


@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_gives_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = VISRegRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_the_samples_does_not_matter(dtype: torch.dtype, tolerance: float) -> None:
    z = torch.randn(2, 64, 8, dtype=dtype)
    losses = [VISRegRegularizer()(x).loss.item() for x in (z, z[:, torch.randperm(64)])]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_directions_change_with_the_step_and_the_seed_only() -> None:
    z, regularizer = torch.rand(1, 32, 8), VISRegRegularizer(num_directions=4)
    first = regularizer(z).loss
    assert torch.equal(regularizer(z).loss, first)
    assert VISRegRegularizer(num_directions=4, seed=1)(z).loss != first
    regularizer.set_progress(Progress(step=1))
    assert regularizer(z).loss != first


def test_terms_are_float32_under_autocast() -> None:
    z = torch.randn(2, 64, 8)
    plain = VISRegRegularizer()(z).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = VISRegRegularizer()(z).loss
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_weights_of_zero_leave_no_gradient() -> None:
    assert not VISRegRegularizer(0, 0, 0)(torch.randn(2, 16, 4, requires_grad=True)).loss.requires_grad


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"center_weight": -1.0}, "`center_weight` must not be negative, got -1"),
        ({"scale_weight": -1.0}, "`scale_weight` must not be negative, got -1"),
        ({"shape_weight": -1.0}, "`shape_weight` must not be negative, got -1"),
        ({"num_directions": 0}, "`num_directions` must be at least 1, got 0"),
        ({"eps": 0.0}, "`eps` must be positive, got 0"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            VISRegRegularizer(**options)
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        VISRegRegularizer()(torch.randn(2, 1, 4))
