import logging
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.regularizers.coding_length import (
    DivergenceCheck,
    coding_matrix,
    cross_log_det,
    log_det,
    series_trace,
    spectral_radius,
    squared_distortion,
    taylor_trace,
)
from e2mc_hf.regularizers.sphere import unit_rows

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
FORMS = ["batch", "feature", "auto"]


def pair(size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows of two views that agree more or less."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    return unit_rows(a), unit_rows(a + b)


def reference_series(a: Tensor, b: Tensor, lam: float, order: int) -> Tensor:
    c = lam * a @ b.T
    return sum((-1) ** (k + 1) / k * torch.linalg.matrix_power(c, k).trace() for k in range(1, order + 1))


def assert_near(value: Tensor, expected: Tensor | float, tolerance: float = 1e-10) -> None:
    assert abs(value - expected) <= tolerance * max(1.0, abs(expected))


@given(size=SIZES, seed=st.integers(0, 2**16), order=st.integers(1, 9), inverse=st.floats(0.05, 2.0))
def test_p15_series_is_the_sum_of_powers_in_either_form(
    size: tuple[int, int], seed: int, order: int, inverse: float
) -> None:
    a, b = pair(size, seed)
    lam = 1 / (size[0] * inverse)
    expected = reference_series(a, b, lam, order)
    for form in FORMS:
        assert_near(taylor_trace(a, b, lam, order, form), expected)


@given(size=SIZES, seed=st.integers(0, 2**16), lam=st.floats(0.0, 1e4))
def test_p15_log_det_is_that_of_torch_in_either_form(size: tuple[int, int], seed: int, lam: float) -> None:
    a, _ = pair(size, seed)
    expected = torch.linalg.slogdet(torch.eye(size[0], dtype=torch.float64) + lam * a @ a.T).logabsdet
    for form in FORMS:
        assert_near(log_det(a, lam, form), expected)


@given(size=SIZES, seed=st.integers(0, 2**16), inverse=st.floats(0.05, 2.0))
@settings(max_examples=200)
def test_p15_cross_log_det_is_the_determinant_of_torch_in_either_form(
    size: tuple[int, int], seed: int, inverse: float
) -> None:
    a, b = pair(size, seed)
    lam = 1 / (size[0] * inverse)
    matrix = torch.eye(size[0], dtype=torch.float64) + lam * a @ b.T
    assume(torch.linalg.cond(matrix) < 1e4)
    determinant = torch.linalg.det(matrix)
    for form in FORMS:
        sign, log_size = cross_log_det(a, b, lam, form)
        assert sign == determinant.sign()
        assert_near(log_size, determinant.abs().log())


@given(size=SIZES, seed=st.integers(0, 2**16))
@settings(max_examples=100)
def test_p15_values_are_invariant_to_rotation_and_to_the_order_of_samples(size: tuple[int, int], seed: int) -> None:
    a, b = pair(size, seed)
    rotation = torch.linalg.qr(torch.randn(size[1], size[1], dtype=torch.float64)).Q
    rows = torch.randperm(size[0])
    lam = 1 / (size[0] * 0.5)
    for change in (lambda x: x @ rotation, lambda x: x[rows]):
        assert_near(taylor_trace(change(a), change(b), lam), taylor_trace(a, b, lam))
        assert_near(log_det(change(a), lam), log_det(a, lam))
        assert_near(cross_log_det(change(a), change(b), lam)[1], cross_log_det(a, b, lam)[1])


@settings(max_examples=100)
@given(size=SIZES, seed=st.integers(0, 2**16), eps_d_squared=st.floats(1.3, 10.0))
def test_p15_series_converges_to_the_log_determinant_when_eps_d_squared_is_above_one(
    size: tuple[int, int], seed: int, eps_d_squared: float
) -> None:
    a, b = pair(size, seed)
    lam = 1 / (size[0] * eps_d_squared)
    order = 60
    # The eigenvalues mu of C have |mu| <= 1/eps_d^2 and there are at most min(N, D): the rest of a geometric series.
    rest = min(size) * eps_d_squared**-order / (1 - 1 / eps_d_squared) / order
    assert abs(taylor_trace(a, a, lam, order) - log_det(a, lam)) <= rest + 1e-10
    sign, log_size = cross_log_det(a, b, lam)
    assert sign == 1
    assert abs(taylor_trace(a, b, lam, order) - log_size) <= rest + 1e-10


def test_more_terms_come_nearer_while_the_series_converges_and_go_farther_where_it_does_not() -> None:
    a, _ = pair((64, 32), 0)
    orders = (2, 4, 8, 16)
    near = [abs(taylor_trace(a, a, 1 / (64 * 0.2), n) - log_det(a, 1 / (64 * 0.2))) for n in orders]
    assert near == sorted(near, reverse=True)
    collapsed = a[:1].expand(64, 32)
    far = [abs(taylor_trace(collapsed, collapsed, 1 / (64 * 0.2), n) - math.log(6)) for n in orders]
    assert far == sorted(far)


def test_collapse_to_one_direction_codes_one_number() -> None:
    a = torch.ones(8, 1, dtype=torch.float64) * pair((1, 5), 0)[0]
    assert_near(log_det(a, 1 / (8 * 0.06)), math.log1p(1 / 0.06))
    assert_near(taylor_trace(a, a, 1 / (8 * 0.06), 3), 1 / 0.06 - 0.06**-2 / 2 + 0.06**-3 / 3)


@pytest.mark.parametrize("order", [1, 2, 4, 5])
@pytest.mark.parametrize("size", [(4, 3), (3, 4)])
def test_gradients_are_the_numerical_ones(order: int, size: tuple[int, int]) -> None:
    a, b = (x.requires_grad_() for x in pair(size, 0))
    assert torch.autograd.gradcheck(lambda a, b: taylor_trace(a, b, 0.7, order), (a, b))
    assert torch.autograd.gradcheck(lambda a: log_det(a, 0.7), a)
    assert torch.autograd.gradcheck(lambda a, b: cross_log_det(a, b, 0.7)[1], (a, b))
    assert torch.autograd.gradcheck(unit_rows, a)


def test_opposed_samples_have_a_negative_determinant_and_singular_ones_none() -> None:
    a = torch.ones(4, 1, dtype=torch.float64)
    assert cross_log_det(a, -a, 1.0)[0] == -1  # 1 - 4
    assert cross_log_det(a, -a, 0.25)[0] == 0  # 1 - 1
    assert cross_log_det(a, -a, 0.2)[0] == 1


def test_log_det_of_float32_is_that_of_float64_at_a_condition_float32_could_not_factorize() -> None:
    a = 1e3 * torch.ones(64, 32) + 1e-2 * torch.randn(64, 32)
    assert_near(log_det(a, 1e3), log_det(a.double(), 1e3), 1e-6)
    assert log_det(a, 1e3).dtype == torch.float32


def test_log_det_of_a_sample_that_is_not_finite_is_nan() -> None:
    assert log_det(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 1.0).isnan()
    assert log_det(torch.tensor([[1.0, math.inf], [0.0, 1.0]]), 1.0).isnan()


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**16))
@settings(max_examples=50)
def test_unit_rows_have_length_one_at_any_scale(scale: float, seed: int) -> None:
    x = scale * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_rows_without_a_direction_are_zero_and_get_no_gradient() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    units = unit_rows(x)
    (gradient,) = torch.autograd.grad(units.square().sum() + units.sum(), x)
    assert torch.equal(units, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    assert gradient[0].abs().max() > 0.01
    assert (gradient[1:] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_spectral_radius_is_the_largest_eigenvalue(seed: int) -> None:
    a, _ = pair((64, 16), seed)
    shared = unit_rows(a + 0.4 * a[:1])  # a direction ahead of the others
    c = coding_matrix(shared, shared, 1 / (64 * 0.06))
    exact = torch.linalg.eigvalsh(c).max()
    assert 0.95 * exact <= spectral_radius(c) <= (1 + 1e-12) * exact
    flat = coding_matrix(a, a, 1 / (64 * 0.06))
    assert 0.8 * torch.linalg.eigvalsh(flat).max() <= spectral_radius(flat) <= torch.linalg.eigvalsh(flat).max()


def test_spectral_radius_of_a_rotation_of_zero_and_of_nothing_finite() -> None:
    rotation = torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    assert spectral_radius(rotation).item() == pytest.approx(3)
    assert spectral_radius(torch.zeros(4, 4)) == 0
    assert spectral_radius(torch.full((4, 4), math.nan)).isnan()


def test_divergence_is_said_once_and_only_above_one(caplog: pytest.LogCaptureFixture) -> None:
    check = DivergenceCheck()
    with caplog.at_level(logging.WARNING):
        check(torch.tensor(1.0), 4, 0)
        check(torch.tensor(3.0), 4, 7)  # between two checks
        assert not caplog.records
        check(torch.tensor(3.0), 4, 10)
        check(torch.tensor(3.0), 4, 20)
    assert len(caplog.records) == 1
    assert "spectral radius of C is 3, above 1" in caplog.text


def test_distortions_of_paper_and_code_have_names() -> None:
    assert squared_distortion("paper") == 0.06
    assert 1024 * squared_distortion("code") == 32  # 1/lambda of the authors' code at their batch size
    assert squared_distortion(0.25) == 0.25


@pytest.mark.parametrize("value", ["papers", 0, -0.1, math.nan])
def test_other_distortions_are_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match=r"`eps_d_squared` must be paper \(0.06\), code \(0.03125\) or a positive"):
        squared_distortion(value)


def test_orders_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="`order` must be at least 1, got 0"):
        taylor_trace(torch.ones(2, 2), torch.ones(2, 2), 1.0, order=0)


def test_series_of_a_scalar_is_that_of_the_logarithm() -> None:
    c = torch.tensor([[0.3]], dtype=torch.float64)
    assert series_trace(c, 60).item() == pytest.approx(math.log(1.3), rel=1e-14)
