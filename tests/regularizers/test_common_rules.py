"""What holds for every regularizer there is, whoever wrote it."""

import inspect

import pytest
import torch
from torch import Tensor

from e2mc_hf.errors import UsageError
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.combined import CombinedRegularizer
from e2mc_hf.regularizers.registry import REGULARIZERS, build_regularizer
from e2mc_hf.regularizers.regularizer import Regularizer

every = pytest.mark.parametrize("name", sorted(REGULARIZERS))


def criterion(name: str, **options: object) -> Regularizer:
    regularizer = build_regularizer(name, options)
    assert isinstance(regularizer, Regularizer)
    return regularizer


def loss_and_gradient(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = criterion(name)(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(2, 40, 12), (2, 24, 40)])
def test_the_order_of_the_samples_does_not_matter(
    name: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]
) -> None:
    z = torch.randn(*shape, dtype=torch.float64).to(dtype)
    order = torch.randperm(shape[1])
    (loss, gradient), (permuted, permuted_gradient) = loss_and_gradient(name, z), loss_and_gradient(name, z[:, order])
    assert abs(permuted - loss) <= tolerance * max(1.0, loss.abs())
    assert (permuted_gradient - gradient[:, order]).abs().max() <= 10 * tolerance * gradient.abs().max()


@every
def test_all_weights_zero_take_no_part_in_the_gradient_and_still_report(name: str) -> None:
    options = dict.fromkeys(_weight_options(name), 0.0)
    z = torch.randn(2, 32, 8, requires_grad=True)
    loss, terms = criterion(name, **options)(z)
    base = z.square().sum()
    (plain,) = torch.autograd.grad(base, z, retain_graph=True)
    (with_zero,) = torch.autograd.grad(base + loss, z)
    assert loss.item() == 0
    assert torch.equal(with_zero, plain)
    assert all(term.isfinite() for term in terms.values())


def _weight_options(name: str) -> list[str]:
    options = [option for option in inspect.signature(REGULARIZERS[name]).parameters if option.endswith("weight")]
    assert options
    return options


COLLAPSED = {
    "all rows equal": torch.ones(2, 32, 8),
    "all rows zero": torch.zeros(2, 32, 8),
    "rank one": torch.randn(2, 32, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(8),
    "rows in pairs": torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1),
    "one dimension constant": torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)) * (torch.arange(8) > 0),
    "one row zero": torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)) * (torch.arange(32) > 0)[:, None],
    "tiny": 1e-4 * torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)),
    "huge": 1e3 * torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)),
}


@every
@pytest.mark.parametrize("case", sorted(COLLAPSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_finite_at_collapse(name: str, case: str, dtype: torch.dtype) -> None:
    loss, gradient = loss_and_gradient(name, COLLAPSED[case].to(dtype))
    assert loss.isfinite()
    assert gradient.isfinite().all()


@every
def test_the_criterion_stays_in_float32_under_autocast(name: str) -> None:
    z = torch.randn(2, 32, 16)
    expected = criterion(name)(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion(name)(z)
        from_half = criterion(name)(z.bfloat16())
    assert found.loss.dtype == from_half.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    assert {term: value.item() for term, value in found.terms.items()} == {
        term: value.item() for term, value in expected.terms.items()
    }
    assert torch.equal(from_half.loss, criterion(name)(z.bfloat16().float()).loss)


@every
def test_the_same_step_gives_the_same_value(name: str) -> None:
    z = torch.randn(2, 32, 16)
    first, second = criterion(name), criterion(name)
    for regularizer in (first, second):
        regularizer.set_progress(Progress(step=7, total_steps=10))
    torch.manual_seed(1)
    one = first(z).loss
    torch.manual_seed(2)
    assert torch.equal(one, second(z).loss)


@every
def test_terms_are_scalars_without_gradient_and_begin_with_the_name(name: str) -> None:
    terms = criterion(name)(torch.randn(2, 32, 8, requires_grad=True)).terms
    own_names = {"marginal_entropy", "off_diagonal_covariance"} if name == "e2mc" else set()
    for term, value in terms.items():
        assert term.startswith(name) or term in own_names
        assert value.shape == ()
        assert not value.requires_grad


@every
def test_a_batch_that_is_too_small_is_refused_with_the_number(name: str) -> None:
    regularizer = criterion(name)
    too_few = regularizer.min_samples - 1
    with pytest.raises(ValueError, match=f"at least {regularizer.min_samples} samples over all processes, got"):
        regularizer(torch.randn(2, too_few, 8))


@every
def test_every_regularizer_states_paper_and_cost(name: str) -> None:
    kind = REGULARIZERS[name]
    assert "https://" in kind.paper
    assert "N" in kind.cost


def test_several_regularizers_add_up() -> None:
    z = torch.randn(2, 32, 8)
    options = {"e2mc.entropy_weight": 10, "radial": {"entropy_weight": 2.0}, "e2mc": {"covariance_weight": 1.0}}
    both = build_regularizer(["e2mc", "radial"], options)
    assert isinstance(both, CombinedRegularizer)
    first = criterion("e2mc", entropy_weight=10.0, covariance_weight=1.0)(z)
    second = criterion("radial", entropy_weight=2.0)(z)
    assert both(z).loss.item() == pytest.approx((first.loss + second.loss).item(), rel=1e-6)
    assert both(z).terms == {**first.terms, **second.terms}


def test_a_sum_passes_progress_and_batch_on_to_its_parts() -> None:
    both = build_regularizer(["e2mc", "sigreg"], {"e2mc.window": 9})
    assert isinstance(both, CombinedRegularizer)
    both.set_progress(Progress(step=5))
    assert [part.step for part in both.parts.values()] == [5, 5]
    both.check_batch(32)
    with pytest.raises(ValueError, match="window"):
        both.check_batch(8)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("none", {"weight": 1}, "`regularizer_args` must be empty without a regularizer"),
        (["e2mc", "e2mc"], {}, "`regularizer` must be none, or different names"),
        (["e2mc", "none"], {}, "`regularizer` must be none, or different names"),
        ([], {}, "`regularizer` must be none, or different names"),
        ("e2mcc", {}, "`regularizer` 'e2mcc' is unknown. Did you mean 'e2mc'?"),
        (["e2mc", "radiall"], {}, "`regularizer` 'radiall' is unknown. Did you mean 'radial'?"),
        (["e2mc", "radial"], {"window": 3}, "`regularizer_args` must say whose option it is"),
        (["e2mc", "radial"], {"koleo.weight": 3}, "`regularizer_args` must say whose option it is"),
        (
            ["e2mc", "radial"],
            {"radial.entropy_wieght": 3},
            "`regularizer_args.radial` has no option 'entropy_wieght'. Did you mean",
        ),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(
    names: str | list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        build_regularizer(names, options)
    assert message in str(refusal.value)


def test_none_is_no_regularizer() -> None:
    assert build_regularizer("none", {}) is None
    assert build_regularizer(["none"], {}) is None
