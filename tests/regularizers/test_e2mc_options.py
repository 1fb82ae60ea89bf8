"""Options of E2MC that are not the paper's; what they do to tied samples is in test_tie_clusters."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_processes
from torch import Tensor

from e2mc_hf.distributed import all_gather, rank, world_size
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.regularizers.entropy import batch_invariant_window, coprime_windows, default_window, marginal_entropy
from e2mc_hf.regularizers.radial import RadialRegularizer
from e2mc_hf.regularizers.regularizer import Regularizer
from e2mc_hf.regularizers.sigreg import SIGRegRegularizer
from e2mc_hf.regularizers.sliced_entropy import SlicedEntropyRegularizer
from e2mc_hf.regularizers.visreg import VISRegRegularizer

EXTRAS: dict[str, dict[str, Any]] = {
    "standardize": {"standardize": True},
    "temperature": {"temperature": 0.572},
    "reference_batch": {"reference_batch": 16},
    "multi_scale": {"window_mode": "multi_scale"},
    "random": {"window_mode": "random"},
    "dither": {"dither": 0.3},
}
STEP_WITH_ANOTHER_WINDOW = 1  # than round(sqrt(N)), when it is random


def normal(num_samples: int, num_dims: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, num_samples, num_dims, dtype=torch.float64).to(dtype)


def loss_and_gradient(regularizer: Regularizer, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = regularizer(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_option_has_an_effect(extra: str) -> None:
    z, regularizer = 2 * normal(64), E2MCRegularizer(**EXTRAS[extra])
    regularizer.set_progress(Progress(step=STEP_WITH_ANOTHER_WINDOW))
    (plain, gradient), (loss, changed) = (loss_and_gradient(r, z) for r in (E2MCRegularizer(), regularizer))
    assert loss != plain
    assert not torch.equal(gradient, changed)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_the_samples_does_not_matter(extra: str, dtype: torch.dtype, tolerance: float) -> None:
    z, order = normal(64, dtype=dtype), torch.randperm(64)
    loss, gradient = loss_and_gradient(E2MCRegularizer(**EXTRAS[extra]), z)
    permuted_loss, permuted_gradient = loss_and_gradient(E2MCRegularizer(**EXTRAS[extra]), z[:, order])
    assert permuted_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert (permuted_gradient - gradient[:, order]).abs().max() <= 20 * tolerance * gradient.abs().max()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["equal", "zero", "rank_one", "duplicated"])
def test_collapse_gives_finite_loss_and_gradient(extra: str, dtype: torch.dtype, case: str) -> None:
    z = {
        "equal": torch.full((2, 16, 4), 0.3),
        "zero": torch.zeros(2, 16, 4),
        "rank_one": torch.randn(2, 16, 1) * torch.arange(1.0, 5.0),
        "duplicated": torch.randn(2, 4, 4).repeat(1, 4, 1),
    }[case].to(dtype)
    loss, gradient = loss_and_gradient(E2MCRegularizer(**EXTRAS[extra]), z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("extra", EXTRAS)
def test_criterion_is_float32_under_autocast(extra: str) -> None:
    z = normal(64, dtype=torch.float32)
    plain = E2MCRegularizer(**EXTRAS[extra])(z).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(E2MCRegularizer(**EXTRAS[extra])(z).loss, plain)


def test_gradient_is_the_numerical_one_with_every_option() -> None:
    z = normal(9, 3).requires_grad_()
    for options in ({"window_mode": "multi_scale", "dither": 0.1}, {"window_mode": "random", "reference_batch": 16}):
        regularizer = E2MCRegularizer(2, 3, standardize=True, temperature=0.572, **options)
        assert torch.autograd.gradcheck(lambda z, r=regularizer: r(z).loss, z)


def test_standardized_embeddings_are_scored_as_if_they_came_so() -> None:
    z = 3 * normal(64) + 1
    ours = E2MCRegularizer(2, 3, standardize=True)(z)
    by_hand = E2MCRegularizer(2, 3)((z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True))
    assert ours.loss.item() == pytest.approx(by_hand.loss.item(), rel=1e-12)


def test_standardized_criterion_leaves_scale_and_mean_to_the_objective() -> None:
    z = 0.5 * normal(64) + 1
    loss, gradient = loss_and_gradient(E2MCRegularizer(standardize=True), z)
    rescaled = z * torch.tensor([0.1, 1.0, 2.0, 5.0]) + torch.tensor([0.0, 1.0, -3.0, 7.0])
    assert E2MCRegularizer(standardize=True)(rescaled).loss.item() == pytest.approx(loss.item(), rel=1e-10)
    assert (gradient * z).sum(dim=1).abs().max() <= 1e-10 * gradient.abs().max()
    # Without the option, VICReg's standard deviation of 1 is pushed up.
    unit = (z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True)
    assert (loss_and_gradient(E2MCRegularizer(1, 0), unit)[1] * unit).sum() < -0.5


@pytest.mark.parametrize(
    ("transform", "temperature", "optimum"),
    [("sigmoid", 1.0, 1.749), ("sigmoid", 0.572, 1.0), ("normal_cdf", 1.0, 1.0), ("normal_cdf", 2.0, 2.0)],
)
def test_entropy_of_normal_coordinates_peaks_where_the_temperature_puts_it(
    transform: str, temperature: float, optimum: float
) -> None:
    # A million samples at the quantiles: the estimator's own optimum lies beyond the distribution's in a small batch.
    z = torch.special.ndtri((torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20)[None, :, None]
    regularizer = E2MCRegularizer(1, 0, transform, temperature=temperature)
    stds = [optimum * factor for factor in (0.95, 0.98, 1.0, 1.02, 1.05)]
    scores = [regularizer(std * z).terms["marginal_entropy"].item() for std in stds]
    assert max(range(5), key=scores.__getitem__) == 2


def force(num_samples: int, **options: Any) -> float:
    """N times the root mean square gradient of an entry, for independent uniform u."""
    u = torch.rand(1, num_samples, 128, generator=torch.Generator().manual_seed(num_samples))
    _, gradient = loss_and_gradient(E2MCRegularizer(128, 0, **options), torch.logit(u, eps=1e-6))
    return num_samples * gradient.square().mean().sqrt().item()


def test_entropy_pulls_on_a_sample_alike_in_batches_of_any_size_with_a_reference() -> None:
    # Measured: 1.38, 1.66, 1.91, 2.15 without, and 1.40, 1.35, 1.33, 1.29 with the reference.
    sizes = (512, 1024, 2048, 4096)
    plain = [force(n) for n in sizes]
    invariant = [force(n, reference_batch=512) for n in sizes]
    assert invariant[0] == plain[0]
    assert plain[3] > 1.45 * plain[0]
    assert max(invariant) < 1.15 * min(invariant)


@given(st.integers(4, 2**16))
@settings(max_examples=100)
def test_window_of_the_reference_batch_is_the_papers_and_grows_as_n_to_the_two_thirds(num_samples: int) -> None:
    assert batch_invariant_window(num_samples, num_samples) == default_window(num_samples)
    assert batch_invariant_window(8 * num_samples, num_samples) == round(4 * math.sqrt(num_samples))
    assert 1 <= batch_invariant_window(4, num_samples) <= 3


@given(st.integers(1, 300))
def test_coprime_windows_have_no_common_divisor_and_lie_an_octave_apart(window: int) -> None:
    first, *rest = coprime_windows(window)
    assert first == window
    assert [k for k in rest if math.gcd(k, window) > 1 or k > window / 2] == []
    assert len(rest) == (window > 1)
    assert not any(math.gcd(k, window) == 1 for k in range(max(rest, default=0) + 1, window // 2 + 1))


def test_multi_scale_entropy_is_the_mean_over_the_two_windows() -> None:
    z = normal(64)
    entropy = E2MCRegularizer(window_mode="multi_scale")(z).terms["marginal_entropy"].item()
    single = [marginal_entropy(view, transform="sigmoid", window=m).mean().item() for view in z for m in (8, 3)]
    assert entropy == pytest.approx(sum(single) / 4, rel=1e-12)


def test_random_windows_are_all_of_m_half_to_m_and_functions_of_seed_and_step() -> None:
    z, seen = normal(64, 1), []
    by_window = {E2MCRegularizer(window=m)(z).loss.item(): m for m in (4, 5, 6, 7, 8)}
    for step in [*range(50), *range(50)]:
        regularizer = E2MCRegularizer(window_mode="random")
        regularizer.set_progress(Progress(step=step))
        seen.append(by_window[regularizer(z).loss.item()])
    assert seen[:50] == seen[50:]
    assert all(4 <= seen[:50].count(m) <= 18 for m in by_window.values())


def test_dither_moves_the_images_by_its_share_of_the_mean_gap() -> None:
    u = torch.linspace(0.25, 0.75, 64, dtype=torch.float64)[:, None].expand(64, 4000)
    z = torch.logit(u)[None]
    # Spacings of one window then vary by sqrt(2) * dither / N about 8 * 0.5 / 63: a second-order loss of entropy.
    dither = 0.1
    lost = E2MCRegularizer()(z).terms["marginal_entropy"] - E2MCRegularizer(dither=dither)(z).terms["marginal_entropy"]
    assert lost.item() == pytest.approx((dither / 64) ** 2 / (8 * 0.5 / 63) ** 2, rel=0.15)


def test_noise_changes_with_the_step_and_the_seed_only() -> None:
    z, regularizer = normal(32), E2MCRegularizer(dither=1.0)
    first = regularizer(z).loss
    assert torch.equal(regularizer(z).loss, first)
    assert E2MCRegularizer(dither=1.0, seed=1)(z).loss != first
    regularizer.set_progress(Progress(step=1))
    assert regularizer(z).loss != first


def test_a_window_that_leaves_no_spacing_is_refused_before_anything_is_computed() -> None:
    E2MCRegularizer(window=15).check_batch(16)
    for mode in ("fixed", "multi_scale", "random"):
        with pytest.raises(ValueError, match="`window` must lie between 1 and N - 1 = 15, got 16"):
            E2MCRegularizer(window=16, window_mode=mode).check_batch(16)
    with pytest.raises(ValueError, match="at least 4 samples over all processes, got 3"):
        E2MCRegularizer().check_batch(3)


@pytest.mark.parametrize("num_samples", [4, 5, 6])
@pytest.mark.parametrize("extra", EXTRAS)
def test_smallest_batches_are_scored_with_any_option(num_samples: int, extra: str) -> None:
    assert E2MCRegularizer(**EXTRAS[extra])(normal(num_samples)).loss.isfinite()
    assert E2MCRegularizer(reference_batch=4096)(normal(num_samples)).loss.isfinite()


def test_options_that_do_not_fit_are_refused() -> None:
    for options, message in (
        ({"temperature": 0.0}, "`temperature` must be positive, got 0"),
        ({"dither": -1.0}, "`dither` must not be negative, got -1"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"reference_batch": 3}, "`reference_batch` must be at least 4, got 3"),
        ({"reference_batch": 512, "window": 5}, "`reference_batch` sets the window, got `window` 5"),
        ({"estimator": "kde", "dither": 0.1}, "belong to m_spacings, got estimator 'kde'"),
        ({"estimator": "kde", "window_mode": "random"}, "belong to m_spacings, got estimator 'kde'"),
        ({"estimator": "kde", "reference_batch": 512}, "belong to m_spacings, got estimator 'kde'"),
        ({"window": 0}, "`window` must lie between 1 and N - 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            E2MCRegularizer(**options)
    with pytest.raises(ValueError, match="`window_mode` must be fixed, multi_scale or random, got 'two'"):
        # Unchecked types: the message is for callers without a type checker.
        E2MCRegularizer.__init__.__wrapped__(E2MCRegularizer(), window_mode="two")  # type: ignore[attr-defined]


def shares_of_all() -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of this process' samples, the gradient averaged as DistributedDataParallel does."""
    regularizers: list[Regularizer] = [
        E2MCRegularizer(window_mode="random", dither=0.3, standardize=True),
        E2MCRegularizer(window_mode="multi_scale", reference_batch=16, temperature=0.572),
        RadialRegularizer(),
        SIGRegRegularizer(num_directions=32),
        VISRegRegularizer(num_directions=32),
        SlicedEntropyRegularizer(num_directions=32),
    ]
    whole = torch.randn(2, 32, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for regularizer in regularizers:
        regularizer.set_progress(Progress(step=3))
        for dtype in (torch.float64, torch.float32):
            z = whole.to(dtype).chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
            loss = regularizer(all_gather(z, dim=1)).loss
            (gradient,) = torch.autograd.grad(loss, z)
            results.append((loss.detach(), gradient / world_size()))
    return results


def test_two_processes_are_one() -> None:
    for (loss, gradient), *both in zip(shares_of_all(), *run_on_processes(shares_of_all, 2), strict=True):
        losses, gradients = zip(*both, strict=True)
        tolerance = 1e-12 if loss.dtype == torch.float64 else 1e-5
        assert abs(sum(losses) / 2 - loss) <= tolerance * loss.abs()
        assert (torch.cat(gradients, dim=1) - gradient).abs().max() <= tolerance * gradient.abs().max()
