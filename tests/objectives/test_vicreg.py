from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.registry import build_objective
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.regularizers.e2mc import E2MCRegularizer

CASES = ["more_samples", "more_dims", "wide_scale"]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def views(arrays: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([arrays["x"], arrays["y"]]).to(dtype).requires_grad_()


def assert_gradient(gradient: Tensor, arrays: dict[str, Tensor], key: str, tolerance: float) -> None:
    for view, name in zip(gradient, "xy", strict=True):
        expected = arrays[f"{key}.grad_{name}"]
        assert (view.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_loss_terms_and_gradient_are_the_authors(
    golden: Golden, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    values, arrays = golden(case)
    embeddings = views(arrays, dtype)
    output = VICReg(4, 8).score(embeddings)
    (gradient,) = torch.autograd.grad(output.loss, embeddings)
    assert output.loss.item() == pytest.approx(values["vicreg_base.loss"], rel=tolerance)
    assert output.terms["invariance"].item() == pytest.approx(values["vicreg.repr_loss"], rel=tolerance)
    assert output.terms["variance"].item() == pytest.approx(values["vicreg.std_loss"], rel=tolerance)
    assert output.terms["covariance"].item() == pytest.approx(values["vicreg.cov_loss"], rel=tolerance)
    assert_gradient(gradient, arrays, "vicreg_base", tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_vicreg_with_e2mc_is_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    embeddings = views(arrays, dtype)
    loss = VICReg(4, 8).score(embeddings).loss + E2MCRegularizer(1000, 100)(embeddings).loss
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert loss.item() == pytest.approx(values["vicreg.loss"], rel=tolerance)
    assert_gradient(gradient, arrays, "vicreg", tolerance)


def test_expander_has_the_layers_of_the_paper() -> None:
    linears = [m for m in VICReg(16, 32).projector if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
        (16, 32, True),
        (32, 32, True),
        (32, 32, False),
    ]
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in VICReg(16, 32).projector) == 2


def test_loss_is_float32_under_autocast_and_finite_where_float16_overflows() -> None:
    embeddings = 100 * torch.randn(2, 64, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = VICReg(4, 8).score(embeddings)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, VICReg(4, 8).score(embeddings).loss)


def test_collapsed_embeddings_have_a_finite_gradient() -> None:
    embeddings = torch.ones(2, 16, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(VICReg(4, 8).score(embeddings).loss, embeddings)
    assert gradient.isfinite().all()


def test_three_views_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_views` must be 2 for vicreg, got 3"):
        VICReg(4, 8)([torch.randn(4, 4)] * 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vicregg", {}, "`objective` 'vicregg' is unknown. Did you mean 'vicreg'?"),
        ("vicreg", {"projector_dims": 8}, "`objective_args` has no option 'projector_dims'. Did you mean"),
        ("vicreg", {"projector_dim": 1}, "`projector_dim` must be at least 2"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_nearest_one(
    name: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        build_objective(name, options, 16)
