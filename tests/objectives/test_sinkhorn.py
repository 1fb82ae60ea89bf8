import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2mc_hf.objectives.sinkhorn import sinkhorn


def random_scores(samples: int, prototypes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(samples, prototypes, generator=generator, dtype=torch.float64) - 1


def multiplied_out(scores: Tensor, temperature: float, num_iterations: int) -> Tensor:
    """Equations 3 to 5 of the SwAV paper with exponentials, one row and one column at a time."""
    samples, prototypes = scores.shape
    plan = (scores / temperature).exp()
    plan = plan / plan.sum()
    for _ in range(num_iterations):
        for k in range(prototypes):
            plan[:, k] /= plan[:, k].sum() * prototypes
        for b in range(samples):
            plan[b] /= plan[b].sum() * samples
    return plan * samples


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(sizes, st.floats(0.05, 1.0), st.integers(1, 5), st.integers(0, 99))
def test_codes_are_those_of_the_equations(size: tuple[int, int], temperature: float, num_iterations: int, seed: int):
    scores = random_scores(*size, seed)
    expected = multiplied_out(scores, temperature, num_iterations)
    assert (sinkhorn(scores, temperature, num_iterations) - expected).abs().max() <= 1e-12


@settings(max_examples=50)
@given(sizes, st.integers(0, 99))
def test_rows_and_columns_of_the_converged_plan_have_equal_mass(size: tuple[int, int], seed: int) -> None:
    samples, prototypes = size
    plan = sinkhorn(random_scores(samples, prototypes, seed), 0.3, 300) / samples
    assert (plan.sum(dim=1) - 1 / samples).abs().max() <= 1e-12
    assert (plan.sum(dim=0) - 1 / prototypes).abs().max() <= 1e-6


@given(sizes, st.integers(0, 99))
def test_plan_is_the_exponential_of_the_scores_with_rows_and_columns_scaled(size: tuple[int, int], seed: int) -> None:
    scores = random_scores(*size, seed)
    scaling = sinkhorn(scores, 0.2).log() - scores / 0.2
    is_sum_of_row_and_column = scaling - scaling[:1] - scaling[:, :1] + scaling[0, 0]
    assert is_sum_of_row_and_column.abs().max() <= 1e-11


@settings(max_examples=50)
@given(sizes, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_scores_up_to_ten_thousand_give_finite_codes_that_sum_to_one(
    size: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    codes = sinkhorn(1e4 * random_scores(*size, seed).to(dtype), 0.05)
    assert codes.isfinite().all()
    assert (codes.sum(dim=1) - 1).abs().max() <= 1e-6


def test_scores_of_ten_thousand_assign_each_sample_to_its_prototype() -> None:
    order = torch.randperm(64)
    scores = torch.full((64, 64), -1e4)
    scores[torch.arange(64), order] = 1e4
    assert torch.equal(sinkhorn(scores, 0.05), torch.nn.functional.one_hot(order, 64).float())


def test_equal_scores_are_shared_by_all_prototypes() -> None:
    assert torch.allclose(sinkhorn(torch.full((8, 5), 0.3), 0.05), torch.full((8, 5), 0.2), atol=1e-7)


def test_samples_that_all_prefer_one_prototype_are_shared_all_the_same() -> None:
    scores = 0.1 * random_scores(40, 4, 0)
    scores[:, 2] += 1
    assert (scores.softmax(dim=1).argmax(dim=1) == 2).all()
    assert (sinkhorn(scores, 0.05, 100).sum(dim=0) - 10).abs().max() <= 1e-3


@settings(max_examples=50)
@given(sizes, st.integers(0, 99))
def test_codes_follow_their_samples_and_ignore_what_is_added_to_a_prototype(size: tuple[int, int], seed: int) -> None:
    scores = random_scores(*size, seed)
    codes, order = sinkhorn(scores, 0.1), torch.randperm(size[0])
    assert (sinkhorn(scores[order], 0.1) - codes[order]).abs().max() <= 1e-12
    assert (sinkhorn(scores + torch.arange(size[1]), 0.1) - codes).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_assigned_in_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    scores = random_scores(16, 8, 0).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(scores, 0.05)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn(scores.float(), 0.05))


def test_scores_stay_as_they_were_and_codes_have_no_gradient() -> None:
    scores = random_scores(6, 3, 0).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores, 0.05).requires_grad
    assert torch.equal(scores, before)
