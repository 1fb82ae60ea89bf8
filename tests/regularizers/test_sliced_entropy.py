import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.directions import random_directions
from e2mc_hf.regularizers.sliced_entropy import SlicedEntropyRegularizer

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


@given(
    st.integers(0, 2**32 - 1),
    st.integers(4, 15),
    st.integers(1, 5),
    st.sampled_from(["sigmoid", "normal_cdf"]),
    st.booleans(),
    st.floats(0.3, 2),
)
@settings(max_examples=50)
def test_term_is_the_equation_worked_in_loops(
    seed: int, num_samples: int, num_dims: int, transform: str, standardize: bool, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, num_samples, num_dims, generator=generator, dtype=torch.float64)
    regularizer = SlicedEntropyRegularizer(
        3.0, transform, num_directions=4, standardize=standardize, temperature=temperature, seed=2
    )
    regularizer.set_progress(Progress(step=5))
    window, entropy = round(math.sqrt(num_samples)), 0.0
    for view in z:
        for a in random_directions(num_dims, 4, 2, 5, z):
            x = view @ a
            x = ((x - x.mean()) / x.std().clamp_min(0.01) if standardize else x) / temperature
            u = sorted((torch.sigmoid(x) if transform == "sigmoid" else torch.special.ndtr(x)).tolist())
            for i in range(num_samples - window):
                spacing = (num_samples + 1) / window * (u[i + window] - u[i])
                entropy += math.log(spacing + 1e-7) / (num_samples - window) / 4 / 2
    output = regularizer(z)
    assert output.terms["sliced_entropy"].item() == pytest.approx(entropy, rel=1e-9, abs=1e-12)
    assert output.loss.item() == pytest.approx(-3 * entropy, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("num_dims", [1, 16, 256])
def test_standard_normal_embeddings_score_nearly_zero(num_dims: int) -> None:
    z = torch.randn(2, 1024, num_dims)
    entropy = SlicedEntropyRegularizer(num_directions=256, bias_correction=True)(z).terms["sliced_entropy"].item()
    assert entropy == pytest.approx(0, abs=0.01)
    plain = SlicedEntropyRegularizer(num_directions=256)(z).terms["sliced_entropy"].item()
    assert plain == pytest.approx(entropy - 0.015, abs=0.002)


def test_wrong_scale_correlation_shape_and_collapse_each_cost_entropy() -> None:
    z = torch.randn(1, 512, 8)
    others = {
        "narrow": 0.5 * z,
        "wide": 2 * z,
        "shifted": z + 1,
        "correlated": z + z[..., :1],
        "duplicated": z[..., :4].repeat(1, 1, 2),
        "heavy": z * (0.3 + 1.7 * (torch.rand(1, 512, 1) < 0.25)),
        "one_dimension_collapsed": z * torch.tensor([1.0] * 7 + [0]),
    }
    best = SlicedEntropyRegularizer()(z).terms["sliced_entropy"]
    scores = {name: SlicedEntropyRegularizer()(other).terms["sliced_entropy"] for name, other in others.items()}
    assert all(score < best - 0.004 for score in scores.values()), (best, scores)


def test_standardized_projections_see_neither_scale_nor_mean() -> None:
    z = torch.rand(1, 64, 4, dtype=torch.float64).requires_grad_()
    regularizer = SlicedEntropyRegularizer(standardize=True)
    loss = regularizer(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert regularizer(3 * z + 7).loss.item() == pytest.approx(loss.item(), rel=1e-10)
    assert abs((gradient * z).sum().item()) < 1e-12
    assert gradient.abs().max() > 1e-3


def test_descent_makes_the_embeddings_standard_normal() -> None:
    z = (torch.rand(1, 128, 1) + torch.rand(1, 128, 3) * torch.tensor([0.5, 1.0, 2.0])).requires_grad_()
    regularizer, optimizer = SlicedEntropyRegularizer(num_directions=32), torch.optim.Adam([z], lr=0.08)
    for step in range(100):
        regularizer.set_progress(Progress(step=step))
        optimizer.zero_grad()
        regularizer(z).loss.backward()
        optimizer.step()
    fresh = random_directions(3, 50, 1, 0, z)
    distances = [stats.kstest((z.detach()[0] @ a).numpy(), "norm").statistic for a in fresh]
    assert max(distances) < 0.12  # 0.73 at the start; 128 normal samples have 0.12 at the 5 % point
    assert torch.corrcoef(z.detach()[0].t()).fill_diagonal_(0).abs().max() < 0.1


def test_gradient_is_the_numerical_one() -> None:
    z = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"standardize": True, "temperature": 0.572, "transform": "sigmoid"}):
        regularizer = SlicedEntropyRegularizer(num_directions=4, **options)
        assert torch.autograd.gradcheck(lambda z, r=regularizer: r(z).loss, z)


@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standardize", [False, True])
def test_collapse_gives_finite_loss_and_gradient(case: str, dtype: torch.dtype, standardize: bool) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = SlicedEntropyRegularizer(standardize=standardize)(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_the_samples_does_not_matter(dtype: torch.dtype, tolerance: float) -> None:
    z = 2 * torch.randn(2, 64, 8, dtype=dtype)
    losses = [SlicedEntropyRegularizer()(x).loss.item() for x in (z, z[:, torch.randperm(64)])]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_directions_change_with_the_step_and_the_seed_only() -> None:
    z, regularizer = torch.rand(1, 32, 8), SlicedEntropyRegularizer(num_directions=4)
    first = regularizer(z).loss
    assert torch.equal(regularizer(z).loss, first)
    assert SlicedEntropyRegularizer(num_directions=4, seed=1)(z).loss != first
    regularizer.set_progress(Progress(step=1))
    assert regularizer(z).loss != first


def test_term_is_float32_under_autocast() -> None:
    z = torch.randn(2, 64, 8)
    plain = SlicedEntropyRegularizer()(z).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = SlicedEntropyRegularizer()(z).loss
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_weight_of_zero_leaves_no_gradient() -> None:
    assert not SlicedEntropyRegularizer(0)(torch.randn(2, 16, 4, requires_grad=True)).loss.requires_grad


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"weight": -1.0}, "`weight` must not be negative, got -1"),
        ({"num_directions": 0}, "`num_directions` must be at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0"),
        ({"window": 0}, "`window` must lie between 1 and N - 1, got 0"),
        ({"eps": -1.0}, "`eps` must not be negative, got -1"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            SlicedEntropyRegularizer(**options)
    with pytest.raises(ValueError, match="`window` must lie between 1 and N - 1 = 7, got 8"):
        SlicedEntropyRegularizer(window=8).check_batch(8)
    with pytest.raises(ValueError, match="at least 4 samples over all processes, got 3"):
        SlicedEntropyRegularizer().check_batch(3)
