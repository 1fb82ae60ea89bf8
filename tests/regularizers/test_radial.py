import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from e2mc_hf.regularizers.entropy import marginal_entropy
from e2mc_hf.regularizers.radial import RadialRegularizer, chi_cross_entropy

COLLAPSED = {
    "equal": torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 16, 6),
    "zero": torch.zeros(2, 16, 6),
    "rank_one": torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0),
    "duplicated": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
}


def chi_radii(num_samples: int, num_dims: int) -> Tensor:
    """Quantiles of the chi distribution, as embeddings (1, N, D) of that length."""
    radius = torch.from_numpy(stats.chi(num_dims).ppf((torch.arange(num_samples).numpy() + 0.5) / num_samples))
    direction = torch.nn.functional.normalize(torch.randn(num_samples, num_dims, dtype=torch.float64), dim=1)
    return (radius[:, None] * direction)[None]


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(4, 40))
@settings(max_examples=50)
def test_cross_entropy_is_the_negative_log_density_of_scipys_chi(seed: int, num_dims: int, num_samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(2, num_samples, generator=generator, dtype=torch.float64) * 20 + 1e-3
    expected = -stats.chi(num_dims).logpdf(radius.numpy()).mean()
    assert chi_cross_entropy(radius, num_dims).item() == pytest.approx(expected, rel=1e-10, abs=1e-9)


def test_terms_are_the_equations_worked_in_loops() -> None:
    z = torch.randn(2, 9, 5, dtype=torch.float64)
    cross_entropy, entropy = 0.0, 0.0
    for view in z.tolist():
        radii = sorted(math.sqrt(sum(entry**2 for entry in row)) for row in view)
        cross_entropy -= sum(stats.chi(5).logpdf(r) for r in radii) / 9 / 2
        entropy += sum(math.log(10 / 3 * (radii[i + 3] - radii[i]) + 1e-7) for i in range(6)) / 6 / 2
    output = RadialRegularizer(2.0, 3.0)(z)
    assert output.terms["radial_cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-9)
    assert output.terms["radial_entropy"].item() == pytest.approx(entropy, rel=1e-9)
    assert output.loss.item() == pytest.approx(2 * cross_entropy - 3 * entropy, rel=1e-9)


@pytest.mark.parametrize("num_dims", [1, 2, 64, 8192])
def test_divergence_of_normal_embeddings_is_near_zero(num_dims: int) -> None:
    z = torch.randn(4, 2048, num_dims, dtype=torch.float32)
    assert RadialRegularizer(bias_correction=True)(z).loss.item() == pytest.approx(0.06, abs=0.05)


@pytest.mark.parametrize("other", ["scaled", "sphere", "wide"])
def test_chi_distributed_radii_score_lowest(other: str) -> None:
    z = chi_radii(512, 16)
    radius = z.norm(dim=2, keepdim=True)
    changed = {"scaled": 1.3 * z, "sphere": 4 * z / radius, "wide": z / radius * (2 * radius - 4).abs()}[other]
    assert RadialRegularizer()(changed).loss > RadialRegularizer()(z).loss + 0.1


def test_descent_brings_the_radius_to_the_chi_distribution() -> None:
    z = (3 * torch.rand(1, 256, 1) * torch.nn.functional.normalize(torch.randn(1, 256, 8), dim=2)).requires_grad_()
    regularizer, optimizer = RadialRegularizer(), torch.optim.Adam([z], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(z).loss.backward()
        optimizer.step()
    assert stats.kstest(z.detach().norm(dim=2)[0].numpy(), stats.chi(8).cdf).statistic < 0.08


def test_float32_keeps_the_value_and_gradient_of_large_dimensions() -> None:
    exact = torch.randn(1, 64, 8192, dtype=torch.float64).requires_grad_()
    single = exact.detach().float().requires_grad_()
    outputs = [RadialRegularizer()(x) for x in (exact, single)]
    gradients = [torch.autograd.grad(o.loss, x)[0] for o, x in zip(outputs, (exact, single), strict=True)]
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), abs=1e-3)
    assert (gradients[1] - gradients[0]).abs().max() <= 1e-3 * gradients[0].abs().max()


def test_gradient_is_the_numerical_one() -> None:
    z = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: RadialRegularizer(2, 3)(z).loss, z)


@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_gives_finite_loss_and_gradient(case: str, dtype: torch.dtype) -> None:
    z = COLLAPSED[case].to(dtype).clone().requires_grad_()
    loss = RadialRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_the_samples_does_not_matter(dtype: torch.dtype, tolerance: float) -> None:
    z = torch.randn(2, 64, 8, dtype=dtype)
    assert RadialRegularizer()(z[:, torch.randperm(64)]).loss.item() == pytest.approx(
        RadialRegularizer()(z).loss.item(), rel=tolerance
    )


def test_terms_are_those_of_marginal_entropy_under_autocast_too() -> None:
    z = torch.randn(2, 64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = RadialRegularizer(window=3)(z)
    expected = torch.stack([marginal_entropy(view.norm(dim=1)[:, None], window=3) for view in z]).mean()
    assert output.loss.dtype == torch.float32
    assert output.terms["radial_entropy"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_weights_of_zero_leave_no_gradient() -> None:
    assert not RadialRegularizer(0, 0)(torch.randn(2, 16, 4, requires_grad=True)).loss.requires_grad


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`cross_entropy_weight` must not be negative, got -1"):
        RadialRegularizer(-1)
    with pytest.raises(ValueError, match="`entropy_weight` must not be negative, got -1"):
        RadialRegularizer(1, -1)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        RadialRegularizer(eps=0)
    with pytest.raises(ValueError, match="`window` must lie between 1 and N - 1 = 7, got 8"):
        RadialRegularizer(window=8).check_batch(8)
    with pytest.raises(ValueError, match="at least 4 samples over all processes, got 3"):
        RadialRegularizer().check_batch(3)
