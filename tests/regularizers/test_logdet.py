import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.regularizers.logdet import LogDetRegularizer

SIZES = st.tuples(st.integers(1, 2), st.integers(2, 12), st.integers(2, 12))
COLLAPSED = ["equal", "zeros", "rank one", "duplicates"]


def collapsed(kind: str, scale: float) -> Tensor:
    row, rows = torch.randn(16), torch.randn(2, 8, 16)
    return (
        scale
        * {
            "equal": row.expand(2, 8, 16),
            "zeros": torch.zeros(2, 8, 16),
            "rank one": torch.randn(2, 8, 1) * row,
            "duplicates": rows[:, [0, 0, 1, 1, 2, 2, 3, 3]],
        }[kind]
    )


@given(size=SIZES, seed=st.integers(0, 2**16), eps=st.floats(1e-3, 10.0), scale=st.floats(0.1, 10))
@settings(max_examples=200)
def test_p15_value_is_the_log_determinant_of_the_covariance(
    size: tuple[int, int, int], seed: int, eps: float, scale: float
) -> None:
    z = scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    covariances = [np.cov(view.numpy(), rowvar=False) + eps * np.eye(size[2]) for view in z]
    expected = np.mean([torch.linalg.slogdet(torch.from_numpy(c)).logabsdet.item() for c in covariances]) / size[2]
    output = LogDetRegularizer(3.0, eps=eps)(z)
    assert output.terms["logdet_covariance"].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert output.loss.item() == pytest.approx(-3 * expected, rel=1e-10, abs=1e-10)


def test_value_is_invariant_to_rotation_and_shift_and_grows_with_the_log_of_the_scale() -> None:
    z = torch.randn(2, 64, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    loss = LogDetRegularizer()(z).loss.item()
    assert LogDetRegularizer()(z @ rotation + 5).loss.item() == pytest.approx(loss, rel=1e-10)
    assert LogDetRegularizer(eps=1e-3 * 9)(3 * z).loss.item() == pytest.approx(loss - 2 * math.log(3), rel=1e-10)


@pytest.mark.parametrize("size", [(2, 6, 3), (2, 4, 6)])
def test_gradient_is_the_numerical_one(size: tuple[int, int, int]) -> None:
    z = torch.randn(*size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: LogDetRegularizer(2.0, eps=0.1)(z).loss, z)


def test_float32_is_float64_rounded_where_a_float32_factorization_would_fail() -> None:
    shared = 1e3 * torch.randn(2, 64, 1)
    z = (shared + torch.randn(2, 64, 32)).requires_grad_()
    loss = LogDetRegularizer()(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    expected = LogDetRegularizer()(wide).loss
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient.double() - expected_gradient).abs().max() <= 1e-6 * expected_gradient.abs().max()


@pytest.mark.parametrize("kind", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_collapsed_embeddings_have_finite_loss_and_gradient(kind: str, dtype: torch.dtype, scale: float) -> None:
    z = collapsed(kind, scale).to(dtype).requires_grad_()
    output = LogDetRegularizer()(z)
    (gradient,) = torch.autograd.grad(output.loss, z)
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
    if kind in ("equal", "zeros"):
        assert output.terms["logdet_covariance"].item() == pytest.approx(math.log(1e-3), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_order_of_samples_is_nothing_to_the_loss(dtype: torch.dtype, tolerance: float) -> None:
    z = torch.randn(2, 32, 16, dtype=dtype)
    loss = LogDetRegularizer()(z).loss
    assert LogDetRegularizer()(z[:, torch.randperm(32)]).loss.item() == pytest.approx(loss.item(), rel=tolerance)


def test_weight_zero_has_no_gradient() -> None:
    output = LogDetRegularizer(0.0)(torch.randn(2, 8, 4, requires_grad=True))
    assert not output.loss.requires_grad
    assert output.loss == 0
    assert output.terms["logdet_covariance"].isfinite()


def test_loss_is_float32_under_autocast() -> None:
    z = torch.randn(2, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = LogDetRegularizer()(z.clone())
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, LogDetRegularizer()(z).loss)


def test_ascent_fills_the_empty_dimensions_of_collapsing_embeddings() -> None:
    z = (torch.randn(1, 128, 1) * torch.randn(8) + 0.02 * torch.randn(1, 128, 8)).requires_grad_()
    before = torch.linalg.eigvalsh(torch.cov(z[0].detach().T))
    optimizer = torch.optim.SGD([z], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        LogDetRegularizer()(z).loss.backward()
        optimizer.step()
    after = torch.linalg.eigvalsh(torch.cov(z[0].detach().T))
    assert before[0] / before[-1] < 1e-3
    assert after[0] / after[-1] > 10 * before[0] / before[-1]
    assert after[0] > 10 * before[0]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`weight` must not be negative, got -1"):
        LogDetRegularizer(-1.0)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        LogDetRegularizer(eps=0)
    with pytest.raises(ValueError, match="at least 2 samples over all processes, got 1"):
        LogDetRegularizer()(torch.randn(2, 1, 4))
