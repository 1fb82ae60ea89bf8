import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.mec import MECRegularizer
from e2mc_hf.regularizers.sphere import unit_rows

SIZES = st.tuples(st.integers(1, 2), st.integers(2, 12), st.integers(1, 12))
COLLAPSED = ["equal", "zeros", "rank one", "duplicates"]


def collapsed(kind: str) -> Tensor:
    row, rows = torch.randn(16), torch.randn(2, 8, 16)
    return {
        "equal": row.expand(2, 8, 16),
        "zeros": torch.zeros(2, 8, 16),
        "rank one": torch.randn(2, 8, 1) * row,
        "duplicates": rows[:, [0, 0, 1, 1, 2, 2, 3, 3]],
    }[kind].clone()


def reference(z: Tensor, eps_d_squared: float, order: int | None) -> float:
    """Coding rate from the eigenvalues of the second moments of the directions; the logarithm itself for no order."""
    rates = []
    for view in z:
        units = torch.stack([row / row.norm() for row in view])
        mu = torch.linalg.eigvalsh(units.T @ units / len(view)) / eps_d_squared
        terms = mu.log1p() if order is None else sum((-1) ** (k + 1) / k * mu**k for k in range(1, order + 1))
        rates.append(eps_d_squared * terms.sum().item())
    return sum(rates) / len(rates)


@given(
    size=SIZES,
    seed=st.integers(0, 2**16),
    order=st.one_of(st.none(), st.integers(1, 6)),
    eps_d_squared=st.floats(0.2, 3.0),
)
@settings(max_examples=150)
def test_rate_is_that_of_the_eigenvalues_of_the_second_moments(
    size: tuple[int, int, int], seed: int, order: int | None, eps_d_squared: float
) -> None:
    z = torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"exact": True} if order is None else {"order": order}
    output = MECRegularizer(3.0, eps_d_squared=eps_d_squared, **options)(z)
    expected = reference(z, eps_d_squared, order)
    assert output.terms["mec_coding_rate"].item() == pytest.approx(expected, rel=1e-10)
    assert output.loss.item() == pytest.approx(-3 * expected, rel=1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_forms_agree_and_only_directions_count(exact: bool) -> None:
    z = torch.randn(2, 24, 16, dtype=torch.float64)
    losses = [MECRegularizer(form=form, exact=exact)(z).loss.item() for form in ("auto", "batch", "feature")]
    losses.append(MECRegularizer(exact=exact)(z * torch.rand(2, 24, 1, dtype=torch.float64)).loss.item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    regularizer = MECRegularizer()
    assert (regularizer.order, regularizer.eps_d_squared, regularizer.exact) == (4, 0.06, False)
    assert regularizer.weights == {"mec_coding_rate": -1.0}
    assert MECRegularizer(eps_d_squared="code").eps_d_squared == 0.03125


def test_series_converges_to_the_exact_rate_when_eps_d_squared_is_above_one() -> None:
    z = torch.randn(2, 24, 16, dtype=torch.float64)
    exact = MECRegularizer(exact=True, eps_d_squared=1.5)(z).loss.item()
    assert MECRegularizer(order=60, eps_d_squared=1.5)(z).loss.item() == pytest.approx(exact, abs=1e-10)


def test_rate_compares_over_batch_sizes_and_ranges_from_collapse_to_one() -> None:
    z = torch.randn(1, 2048, 8, dtype=torch.float64)
    rates = [MECRegularizer(exact=True)(z[:, :n]).terms["mec_coding_rate"].item() for n in (256, 512, 2048)]
    assert max(rates) - min(rates) < 0.02 * rates[0]
    ceiling = 8 * 0.06 * math.log1p(1 / (8 * 0.06))
    assert rates[-1] == pytest.approx(ceiling, rel=0.01)
    assert max(rates) <= ceiling
    basis = torch.eye(1024, dtype=torch.float64)[None]
    assert 0.99 < MECRegularizer(exact=True)(basis).terms["mec_coding_rate"] < 1
    equal = torch.ones(1, 32, 8, dtype=torch.float64)
    assert MECRegularizer(exact=True)(equal).terms["mec_coding_rate"].item() == pytest.approx(
        0.06 * math.log1p(1 / 0.06)
    )


@pytest.mark.parametrize("options", [{}, {"order": 5}, {"exact": True}])
def test_gradient_is_the_numerical_one(options: dict[str, Any]) -> None:
    for size in ((2, 5, 3), (2, 3, 5)):
        z = torch.randn(*size, dtype=torch.float64, requires_grad=True)
        regularizer = MECRegularizer(2.0, eps_d_squared=0.5, **options)
        assert torch.autograd.gradcheck(lambda z, r=regularizer: r(z).loss, z)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"order": 1}, {"form": "feature"}])
@pytest.mark.parametrize("kind", COLLAPSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_embeddings_have_finite_loss_and_gradient(
    options: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    z = collapsed(kind).to(dtype).requires_grad_()
    output = MECRegularizer(**options)(z)
    (gradient,) = torch.autograd.grad(output.loss, z)
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("exact", [False, True])
def test_order_of_samples_is_nothing_to_the_loss(dtype: torch.dtype, tolerance: float, exact: bool) -> None:
    z = torch.randn(2, 32, 16, dtype=dtype)
    loss = MECRegularizer(exact=exact)(z).loss
    assert MECRegularizer(exact=exact)(z[:, torch.randperm(32)]).loss.item() == pytest.approx(
        loss.item(), rel=tolerance
    )


def test_weight_zero_has_no_gradient() -> None:
    output = MECRegularizer(0.0)(torch.randn(2, 8, 4, requires_grad=True))
    assert not output.loss.requires_grad
    assert output.loss == 0
    assert output.terms["mec_coding_rate"].isfinite()


@pytest.mark.parametrize("exact", [False, True])
def test_loss_is_float32_under_autocast(exact: bool) -> None:
    z = torch.randn(2, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = MECRegularizer(exact=exact)(z.clone())
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, MECRegularizer(exact=exact)(z).loss)


@pytest.mark.parametrize(("kind", "eps_d_squared", "warns"), [("equal", "paper", True), ("equal", 1.01, False)])
def test_divergence_of_the_series_is_said_once(
    caplog: pytest.LogCaptureFixture, kind: str, eps_d_squared: Any, warns: bool
) -> None:
    regularizer, exact = (MECRegularizer(eps_d_squared=eps_d_squared, exact=exact) for exact in (False, True))
    z = collapsed(kind).requires_grad_()
    with caplog.at_level(logging.WARNING):
        exact(z)
        with torch.no_grad():
            regularizer(z)
        assert not caplog.records
        for step in (9, 10, 20):
            regularizer.set_progress(Progress(step, 100, 10))
            radius = regularizer(z).terms["mec_spectral_radius"]
    assert radius.item() == pytest.approx(1 / regularizer.eps_d_squared, rel=1e-5)
    assert len(caplog.records) == int(warns)
    assert ("spectral radius of C is 16.7, above 1" in caplog.text) == warns


def test_spread_embeddings_let_the_papers_series_converge(caplog: pytest.LogCaptureFixture) -> None:
    z = torch.randn(2, 128, 256, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        assert MECRegularizer()(z).terms["mec_spectral_radius"] < 1
    assert not caplog.records
    series, exact = (MECRegularizer(exact=exact)(z).terms["mec_coding_rate"].item() for exact in (False, True))
    assert series == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("exact", [False, True])
def test_ascent_spreads_the_directions_of_collapsing_embeddings(exact: bool) -> None:
    row = torch.randn(1, 1, 8)
    z = (row + 0.3 * torch.randn(1, 64, 8)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    regularizer = MECRegularizer(exact=exact, eps_d_squared=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        regularizer(z).loss.backward()
        optimizer.step()
    units = unit_rows(z[0].detach())
    spectrum = torch.linalg.eigvalsh(units.T @ units / 64)
    assert spectrum.max() < 0.2
    assert spectrum.min() > 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "`weight` must not be negative, got -1"),
        ({"order": 0}, "`order` must be at least 1, got 0"),
        ({"eps_d_squared": 0.0}, "`eps_d_squared` must be paper"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MECRegularizer(**options)
