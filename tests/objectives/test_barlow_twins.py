from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.barlow_twins import BarlowTwins, Form, correlation_terms, standardize
from e2mc_hf.options import build

# Four samples of two dimensions with mean 0, variance 1 and no correlation.
DECORRELATED = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def naive_terms(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eq. 1 and 2, one pair of dimensions at a time."""
    a, b = [(view - view.mean(dim=0)) / (view.var(dim=0, unbiased=False) + eps).sqrt() for view in z]
    num_samples, num_dims = a.shape
    diagonal, off_diagonal = z.new_zeros(()), z.new_zeros(())
    for i in range(num_dims):
        for j in range(num_dims):
            correlation = (a[:, i] * b[:, j]).sum() / num_samples
            if i == j:
                diagonal = diagonal + (1 - correlation) ** 2
            else:
                off_diagonal = off_diagonal + correlation**2
    return diagonal, off_diagonal


def random_views(seed: int, num_samples: int, num_dims: int) -> Tensor:
    """Two views that agree to some degree, with dimensions of unlike location and scale."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = (torch.randn(2, num_samples, num_dims, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.empty(2, 1, num_dims, dtype=torch.float64).log_normal_(0, 1, generator=generator)
    return (shared[:1] + own) * scale + shared.mean(dim=1, keepdim=True)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    num_samples=st.integers(2, 8),
    num_dims=st.integers(2, 6),
    form=st.sampled_from(["feature", "gram"]),
)
def test_terms_and_gradient_are_those_of_the_equations(seed: int, num_samples: int, num_dims: int, form: Form) -> None:
    z = random_views(seed, num_samples, num_dims).requires_grad_()
    terms = correlation_terms(standardize(z, 1e-5), form=form)
    for term, expected in zip(terms, naive_terms(z, 1e-5), strict=True):
        assert term.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected, z, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)


def test_loss_weighs_the_terms_as_the_paper_does() -> None:
    z = random_views(0, 16, 4)
    diagonal, off_diagonal = (term.item() for term in naive_terms(z, 1e-5))
    output = BarlowTwins(4, 8).score(z)
    assert output.loss.item() == pytest.approx(diagonal + 0.0051 * off_diagonal, rel=1e-12)
    assert output.terms["barlow_diagonal"].item() == pytest.approx(diagonal, rel=1e-12)
    assert output.terms["barlow_off_diagonal"].item() == pytest.approx(off_diagonal, rel=1e-12)
    scaled = BarlowTwins(4, 8, scale_loss=0.024, off_diagonal_weight=2.0).score(z)
    assert scaled.loss.item() == pytest.approx(0.024 * (diagonal + 2 * off_diagonal), rel=1e-12)
    assert scaled.terms == output.terms


@pytest.mark.parametrize(
    ("second", "diagonal", "off_diagonal"),
    [
        (DECORRELATED, 0.0, 0.0),
        (-DECORRELATED, 8.0, 0.0),
        (DECORRELATED.flip(1), 2.0, 2.0),
        (DECORRELATED.prod(dim=1, keepdim=True).expand(4, 2), 2.0, 0.0),
        (DECORRELATED[:, :1].expand(4, 2), 1.0, 1.0),
    ],
    ids=["identical", "negated", "dimensions exchanged", "uncorrelated", "first dimension repeated"],
)
@pytest.mark.parametrize("form", ["feature", "gram"])
def test_terms_of_views_worked_by_hand(second: Tensor, diagonal: float, off_diagonal: float, form: Form) -> None:
    terms = correlation_terms(standardize(torch.stack([DECORRELATED, second]), 1e-15), form=form)
    assert [term.item() for term in terms] == pytest.approx([diagonal, off_diagonal], abs=1e-12)


@given(seed=st.integers(0, 2**31))
def test_location_and_scale_of_a_dimension_and_order_of_samples_do_not_matter(seed: int) -> None:
    z = random_views(seed, 12, 5)
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.empty(2, 1, 5, dtype=torch.float64).log_normal_(0, 2, generator=generator)
    sign = torch.randint(2, (1, 1, 5), generator=generator) * 2 - 1
    shift = 10 * torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    objective = BarlowTwins(4, 8, eps=1e-15)
    expected = objective.score(z).loss.item()
    for same in (scale * sign * z + shift, z[:, torch.randperm(12, generator=generator)], z.flip(0)):
        assert objective.score(same).loss.item() == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 2**31), num_samples=st.integers(4, 40), num_dims=st.integers(2, 40))
def test_both_forms_agree_on_value_and_gradient(seed: int, num_samples: int, num_dims: int) -> None:
    z = random_views(seed, num_samples, num_dims).requires_grad_()
    feature, gram = (correlation_terms(standardize(z, 1e-5), form=form)[1] for form in ("feature", "gram"))
    assert gram.item() == pytest.approx(feature.item(), rel=1e-10)
    (gradient,), (expected) = torch.autograd.grad(gram, z), torch.autograd.grad(feature, z)[0]
    assert (gradient - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("num_dims", "expected"), [(32, "feature"), (33, "gram")])
def test_the_gram_form_is_taken_when_dimensions_outnumber_twice_the_samples(num_dims: int, expected: Form) -> None:
    standardized = standardize(random_views(0, 16, num_dims).float(), 1e-5)
    auto, feature, gram = (correlation_terms(standardized, form=form)[1] for form in ("auto", "feature", "gram"))
    assert feature != gram  # by rounding: otherwise the next line would hold for either
    assert auto == {"feature": feature, "gram": gram}[expected]


@pytest.mark.parametrize("num_dims", [64, 1024])
def test_float32_keeps_five_digits(num_dims: int) -> None:
    z = random_views(0, 128, num_dims).requires_grad_()
    loss, single = (BarlowTwins(4, 8).score(x).loss for x in (z, z.float()))
    (gradient,), (single_gradient,) = torch.autograd.grad(loss, z), torch.autograd.grad(single, z)
    assert single.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (single_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_embeddings_are_standardized_as_batch_normalization_does() -> None:
    z = random_views(0, 16, 4)
    norm = nn.BatchNorm1d(4, affine=False, dtype=torch.float64)
    torch.testing.assert_close(standardize(z, 1e-5), torch.stack([norm(view) for view in z]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_dims", [4, 64])
@pytest.mark.parametrize("kind", ["equal", "zero", "one constant dimension", "rank 1", "duplicated rows"])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(kind: str, num_dims: int, dtype: torch.dtype) -> None:
    z = torch.randn(2, 8, num_dims, dtype=dtype)
    if kind == "one constant dimension":
        z[..., 1] = 7
    else:
        z = {
            "equal": z[:, :1].expand(2, 8, num_dims),
            "zero": 0 * z,
            "rank 1": z[..., :1] * z[:, :1],
            "duplicated rows": z[:, :2].repeat(1, 4, 1),
        }[kind]
    z = z.clone().requires_grad_()
    loss = BarlowTwins(4, 8).score(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_loss_is_float32_under_autocast_and_finite_where_float16_overflows() -> None:
    z = 1e5 * torch.randn(2, 64, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = BarlowTwins(4, 8).score(z).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, BarlowTwins(4, 8).score(z).loss)


def test_projector_has_the_layers_of_the_paper() -> None:
    head = BarlowTwins(16, 32).projector
    assert [(m.in_features, m.out_features, m.bias) for m in head if isinstance(m, nn.Linear)] == [
        (16, 32, None),
        (32, 32, None),
        (32, 32, None),
    ]
    assert [type(m) for m in head] == 2 * [nn.Linear, nn.BatchNorm1d, nn.ReLU] + [nn.Linear]


def test_embeddings_are_the_projectors_outputs_and_reach_every_weight() -> None:
    objective = BarlowTwins(4, 6)
    features = [torch.randn(8, 4), torch.randn(8, 4)]
    output = objective(features)
    torch.testing.assert_close(output.embeddings, torch.stack([objective.projector(view) for view in features]))
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters())
    assert not any(term.requires_grad for term in output.terms.values())


def test_three_views_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_views` must be 2 for barlow_twins, got 3"):
        BarlowTwins(4, 8)([torch.randn(4, 4)] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_dim": 1}, "`projector_dim` must be at least 2 and `projector_layers` at least 1, got 1 and 3"),
        ({"projector_layers": 0}, "got 8192 and 0"),
        ({"off_diagonal_weight": -1.0}, r"`off_diagonal_weight` must not be negative, got -1\.0"),
        ({"scale_loss": 0.0}, r"`scale_loss` and `eps` must be positive, got 0\.0 and 1e-05"),
        ({"eps": 0.0}, r"`scale_loss` and `eps` must be positive, got 1\.0 and 0\.0"),
        ({"lambd": 0.0051}, "no option 'lambd'"),
    ],
)
def test_unfit_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(BarlowTwins, options, "objective_args", 16)
