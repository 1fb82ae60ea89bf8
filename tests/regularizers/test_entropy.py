"""Properties of the entropy estimators; P1-P13 are the project's list of them."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from e2mc_hf.regularizers.entropy import default_window, marginal_entropy, sort_coordinates, van_es_correction

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(4, 200)


def normal(seed: int, num_samples: int, num_dims: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, num_dims, generator=generator, dtype=torch.float64).to(dtype)


def autograd_form(x: Tensor, window: int, eps: float) -> Tensor:
    """The equation as it is written, differentiated by autograd."""
    ordered = x.sort(dim=0, stable=True).values
    spacings = (x.shape[0] + 1) / window * (ordered[window:] - ordered[:-window])
    return torch.log(spacings + eps).mean(dim=0)


@given(seeds, sizes, st.data())
def test_p1_corrected_estimate_is_scipys_van_es(seed: int, num_samples: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, (num_samples - 1) // 2))
    x = normal(seed, num_samples)
    ours = marginal_entropy(x, window=window, eps=0.0, bias_correction=True)
    scipy = stats.differential_entropy(x.numpy(), window_length=window, method="van es")
    np.testing.assert_allclose(ours.numpy(), scipy, rtol=0, atol=1e-10)


@given(seeds, sizes, st.integers(-100, 100), st.sampled_from([torch.float32, torch.float64]))
def test_p2_translation_changes_nothing(seed: int, num_samples: int, shift: int, dtype: torch.dtype) -> None:
    # On a grid of 2^-14 the shifted samples are exact in float32, so that nothing but the estimator is tested.
    x = normal(seed, num_samples).mul(2**14).round().div(2**14).to(dtype)
    difference = marginal_entropy(x + shift) - marginal_entropy(x)
    assert difference.abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6)


@given(seeds, sizes, st.floats(1e-3, 1e3), st.sampled_from([-1.0, 1.0]))
def test_p3_scaling_adds_the_logarithm_of_the_scale(seed: int, num_samples: int, scale: float, sign: float) -> None:
    x = normal(seed, num_samples)
    difference = marginal_entropy(sign * scale * x, eps=0.0) - marginal_entropy(x, eps=0.0)
    assert (difference - math.log(scale)).abs().max() <= 1e-12


@given(seeds, sizes, st.integers(-10, 10), st.sampled_from([-1.0, 1.0]))
def test_p3_scaling_holds_in_float32(seed: int, num_samples: int, exponent: int, sign: float) -> None:
    x = normal(seed, num_samples, dtype=torch.float32)
    difference = marginal_entropy(sign * 2.0**exponent * x, eps=0.0) - marginal_entropy(x, eps=0.0)
    assert (difference - exponent * math.log(2)).abs().max() <= 1e-6 * max(1, abs(exponent))


@given(seeds, st.integers(4, 60), st.integers(1, 6))
def test_p4_rows_permute_without_effect_and_columns_with_their_values(
    seed: int, num_samples: int, num_dims: int
) -> None:
    for dtype in (torch.float32, torch.float64):
        x = normal(seed, num_samples, num_dims, dtype)
        rows = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
        columns = torch.randperm(num_dims, generator=torch.Generator().manual_seed(seed))
        entropy = marginal_entropy(x)
        assert torch.equal(marginal_entropy(x[rows]), entropy)
        assert torch.equal(marginal_entropy(x[:, columns]), entropy[columns])


@given(seeds, sizes)
def test_p5_reflection_changes_nothing(seed: int, num_samples: int) -> None:
    x = normal(seed, num_samples)
    assert (marginal_entropy(-x) - marginal_entropy(x)).abs().max() <= 1e-12


@given(seeds, sizes, st.floats(1e-9, 1e-3))
def test_p6_samples_of_the_unit_interval_stay_within_the_bounds(seed: int, num_samples: int, eps: float) -> None:
    x = torch.rand(num_samples, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    window = default_window(num_samples)
    entropy = marginal_entropy(x, eps=eps)
    assert (entropy >= math.log(eps) - 1e-12).all()
    assert (entropy <= math.log((num_samples + 1) / (num_samples - window) + eps) + 1e-12).all()
    constant = marginal_entropy(torch.full((num_samples, 1), 0.3, dtype=torch.float64), eps=eps)
    assert constant.item() == pytest.approx(math.log(eps), abs=1e-12)


def test_p7_clusters_of_ties_reach_the_upper_bound() -> None:
    num_samples, window = 256, 16
    clusters = torch.linspace(0, 1, num_samples // window, dtype=torch.float64).repeat_interleave(window)[:, None]
    bound = math.log((num_samples + 1) / (num_samples - window))
    assert marginal_entropy(clusters, eps=0.0).item() == pytest.approx(bound, abs=1e-9)


def test_p7_uniform_scores_highest_of_the_beta_family() -> None:
    rng = np.random.default_rng(0)
    scores = {a: marginal_entropy(torch.from_numpy(rng.beta(a, a, (2048, 20)))).mean().item() for a in (0.3, 1.0, 3.0)}
    assert max(scores, key=lambda a: scores[a]) == 1.0


def test_p8_correction_removes_the_bias_on_the_uniform() -> None:
    x = torch.rand(2048, 300, dtype=torch.float64)
    assert abs(marginal_entropy(x, bias_correction=True).mean().item()) <= 0.002
    assert marginal_entropy(x).mean().item() == pytest.approx(-0.0107, abs=0.002)


@pytest.mark.parametrize(("name", "truth"), [("normal", 0.5 * math.log(2 * math.pi * math.e)), ("exponential", 1.0)])
def test_p8_error_shrinks_with_the_sample(name: str, truth: float) -> None:
    rng = np.random.default_rng(0)
    draw = {"normal": rng.standard_normal, "exponential": rng.standard_exponential}[name]
    errors = [
        marginal_entropy(torch.from_numpy(draw((n, 300))), bias_correction=True).mean().item() - truth
        for n in (256, 2048)
    ]
    expected = {"normal": (-0.121, -0.061), "exponential": (-0.069, -0.035)}[name]
    assert errors == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("transform", [None, "sigmoid", "normal_cdf"])
def test_p9_gradient_is_the_numerical_one(transform: str | None) -> None:
    x = normal(0, 20).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: marginal_entropy(x, transform=transform), x)


@given(seeds, sizes)
def test_p9_gradient_knows_translation_and_scaling(seed: int, num_samples: int) -> None:
    x = normal(seed, num_samples).requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_entropy(x, eps=0.0).sum(), x)
    largest = max(1.0, gradient.abs().max().item())
    assert gradient.sum(dim=0).abs().max() <= 1e-9 * largest
    assert ((x * gradient).sum(dim=0) - 1).abs().max() <= 1e-9 * largest


@given(seeds, sizes, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_value_and_gradient_are_autograds(seed: int, num_samples: int, dtype: torch.dtype, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, num_samples - 1))
    x = normal(seed, num_samples, dtype=dtype).requires_grad_()
    ours, theirs = marginal_entropy(x, window=window), autograd_form(x, window, 1e-7)
    (ours_gradient,) = torch.autograd.grad(ours.sum(), x)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), x)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours_gradient, their_gradient, rtol=0, atol=tolerance * their_gradient.abs().max())


@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 5), seeds)
def test_p10_any_ties_give_finite_values_and_bounded_gradients(
    num_samples: int, num_dims: int, num_values: int, seed: int
) -> None:
    eps, window = 1e-7, default_window(num_samples)
    values = torch.randint(num_values, (num_samples, num_dims), generator=torch.Generator().manual_seed(seed))
    z = values.double().requires_grad_()
    entropy = marginal_entropy(z, transform="sigmoid", eps=eps)
    (gradient,) = torch.autograd.grad(entropy.sum(), z)
    assert entropy.isfinite().all()
    bound = 0.25 * (num_samples + 1) / (window * (num_samples - window) * eps)
    assert gradient.abs().max() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p10_ties_are_broken_by_row(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 0.0, 0.5, 0.5, -0.0, -1.0], dtype=dtype)[:, None]
    ordered, order = sort_coordinates(x)
    assert order.tolist() == [[5, 1, 4, 0, 2, 3]]
    assert torch.equal(ordered[0], x[order[0], 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-13)])
def test_p10_ties_at_the_end_of_a_tensor_are_ties_as_elsewhere(dtype: torch.dtype, tolerance: float) -> None:
    # Of 41 * 13 entries torch maps the last ones by another code than the rest: ties differed by a bit, up to NaN.
    for seed in range(300):
        values = torch.randn(6, 13, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x = values.repeat(7, 1)[:41]
        entropy = marginal_entropy(x, transform="sigmoid", window=3)
        alone = marginal_entropy(x[:, -1:], transform="sigmoid", window=3)
        assert (entropy[-1:] - alone).abs() <= tolerance * entropy[-1].abs(), seed


@given(seeds, st.integers(2, 300))
def test_float32_sort_is_torchs_for_any_finite_values(seed: int, num_samples: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, (num_samples, 2), dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32)).nan_to_num(0.0)
    assert torch.equal(sort_coordinates(x)[0], x.t().sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_p11_half_precision_samples_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = normal(0, 512).to(dtype)
    entropy = marginal_entropy(x, transform="sigmoid")
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, marginal_entropy(x.float(), transform="sigmoid"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_p12_nan_stays_in_its_column(dtype: torch.dtype, sign: int) -> None:
    x = normal(0, 50, 4, dtype)
    x[7, 2] = math.copysign(math.nan, sign)
    assert marginal_entropy(x).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("transform", [None, "sigmoid"])
def test_several_windows_are_the_mean_of_each(transform: str | None, bias_correction: bool) -> None:
    x = normal(0, 30).requires_grad_()
    several = marginal_entropy(x, transform=transform, window=(5, 2), bias_correction=bias_correction)
    single = [marginal_entropy(x, transform=transform, window=m, bias_correction=bias_correction) for m in (5, 2)]
    gradients = [torch.autograd.grad(h.sum(), x)[0] for h in (several, *single)]
    torch.testing.assert_close(several, (single[0] + single[1]) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [0, 8, 9, -1, (), (2, 8), (0, 2)])
def test_p13_a_window_without_spacings_is_refused(window: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`window` must lie between 1 and N - 1.*, got {re.escape(str(window))}"):
        marginal_entropy(normal(0, 8), window=window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "knn"}, "`estimator` must be m_spacings or kde"),
        ({"estimator": "kde", "window": 3}, "belong to m_spacings"),
        ({"bandwidth": 0.1}, "`bandwidth` belongs to kde"),
        ({"estimator": "kde", "bandwidth": -1.0}, "`bandwidth` must be positive"),
        ({"transform": "tanh"}, "`transform` must be sigmoid or normal_cdf"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    # Unchecked types: the messages are for callers without a type checker.
    with pytest.raises(ValueError, match=message):
        marginal_entropy.__wrapped__(normal(0, 8), **options)  # type: ignore[attr-defined]


@pytest.mark.parametrize("transform", ["sigmoid", "normal_cdf"])
def test_float32_resolves_both_ends_of_the_unit_interval(transform: str) -> None:
    z = 5 * normal(0, 256, 8)
    exact, single = (x.requires_grad_() for x in (z.clone(), z.float()))
    entropies = [marginal_entropy(x, transform=transform) for x in (exact, single)]
    gradients = [torch.autograd.grad(h.sum(), x)[0] for h, x in zip(entropies, (exact, single), strict=True)]
    torch.testing.assert_close(entropies[1].double(), entropies[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=0, atol=1e-4 * gradients[0].abs().max())


def test_blocks_of_coordinates_do_not_show() -> None:
    x = normal(0, 700, 1000, torch.float32)
    assert torch.equal(marginal_entropy(x)[993:], marginal_entropy(x[:, 993:]))


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    x = normal(0, 20).requires_grad_()
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(marginal_entropy(x).sum(), x, create_graph=True)


def test_correction_is_the_digamma_expression_of_the_bias() -> None:
    # METHOD: bias of the plain estimate on the uniform is psi(m) - psi(N+1) + log((N+1)/m).
    from scipy.special import digamma

    num_samples, window = 512, 23
    bias = digamma(window) - digamma(num_samples + 1) + math.log((num_samples + 1) / window)
    assert van_es_correction(num_samples, window) == pytest.approx(-bias, abs=1e-12)


def naive_kde(x: Tensor, bandwidth: float) -> list[float]:
    entropies = []
    for column in x.t().tolist():
        logs = []
        for i, a in enumerate(column):
            kernel = [math.exp(-(((a - b) / bandwidth) ** 2) / 2) for j, b in enumerate(column) if j != i]
            logs.append(math.log(sum(kernel) / (len(kernel) * bandwidth * math.sqrt(2 * math.pi)) + 1e-7))
        entropies.append(-sum(logs) / len(logs))
    return entropies


def test_kernel_density_estimate_is_the_leave_one_out_sum() -> None:
    x = normal(0, 12)
    assert marginal_entropy(x, estimator="kde", bandwidth=0.4).tolist() == pytest.approx(naive_kde(x, 0.4), rel=1e-12)


def test_kernel_density_estimate_comes_near_the_true_entropy_of_the_normal() -> None:
    entropy = marginal_entropy(normal(0, 1000, 20), estimator="kde").mean().item()
    assert entropy == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.05)


@pytest.mark.parametrize("bandwidth", [None, 0.3])
@pytest.mark.parametrize("transform", [None, "sigmoid"])
def test_kernel_density_gradient_is_the_numerical_one(transform: str | None, bandwidth: float | None) -> None:
    x = normal(0, 10).requires_grad_()
    options = {"transform": transform, "bandwidth": bandwidth}
    assert torch.autograd.gradcheck(lambda x: marginal_entropy(x, estimator="kde", **options), x)


def test_kernel_density_is_finite_at_collapse() -> None:
    x = torch.full((16, 2), 0.5).requires_grad_()
    entropy = marginal_entropy(x, estimator="kde")
    (gradient,) = torch.autograd.grad(entropy.sum(), x)
    assert entropy.isfinite().all()
    assert gradient.isfinite().all()
