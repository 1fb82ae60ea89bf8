"""The criterion shared over processes is the gathered one, with every option: value, terms and gradient."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch import Tensor

from e2mc_hf.distributed import all_gather, own_dimensions, rank, share_dimensions, world_size
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.combined import CombinedRegularizer
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.regularizers.koleo import KoLeoRegularizer
from e2mc_hf.regularizers.output import RegularizerOutput
from e2mc_hf.regularizers.regularizer import Regularizer
from e2mc_hf.regularizers.sigreg import SIGRegRegularizer
from e2mc_hf.regularizers.vcreg import VCRegRegularizer


class DoubledTerms(E2MCRegularizer):
    """A criterion of someone who defines `terms`, as `Regularizer` says."""

    def terms(self, z: Tensor) -> dict[str, Tensor]:
        return {name: 2 * term for name, term in super().terms(z).items()}


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
# More dimensions than samples (the Gram form), more samples (the feature form), products of several blocks, and fewer
# dimensions than processes.
SHAPES = {"wide": (2, 24, 37), "tall": (2, 40, 13), "blocks": (2, 300, 301), "narrow": (2, 16, 1)}
CRITERIA: dict[str, Callable[[], Regularizer | CombinedRegularizer]] = {
    "e2mc": lambda: E2MCRegularizer(1000, 100),
    "e2mc_normal_cdf": lambda: E2MCRegularizer(1, 25, transform="normal_cdf", temperature=0.7),
    "e2mc_entropy": lambda: E2MCRegularizer(1, 0, window=5),
    "e2mc_covariance": lambda: E2MCRegularizer(0, 1),
    "e2mc_for_the_log": lambda: E2MCRegularizer(0, 0),
    "e2mc_kde": lambda: E2MCRegularizer(1, 1, estimator="kde"),
    "e2mc_bias_correction": lambda: E2MCRegularizer(1, 1, bias_correction=True, debias_covariance=True),
    "e2mc_standardize": lambda: E2MCRegularizer(1, 1, standardize=True, temperature=0.572, window_mode="multi_scale"),
    "e2mc_dither": lambda: E2MCRegularizer(1, 1, dither=0.3, window_mode="random", seed=3),
    "e2mc_dither_standardize": lambda: E2MCRegularizer(1, 1, dither=0.1, reference_batch=8, standardize=True),
    "own_terms": lambda: DoubledTerms(1000, 100),
    "vcreg": lambda: VCRegRegularizer(25, 1),
    "vcreg_hypersphere": lambda: VCRegRegularizer(25, 1, space="hypersphere"),
    "combined": lambda: CombinedRegularizer(
        {
            "e2mc": E2MCRegularizer(0, 0),
            "vcreg": VCRegRegularizer(2, 1),
            "koleo": KoLeoRegularizer(),
            "sigreg": SIGRegRegularizer(num_directions=16),
        }
    ),
}
CASES = [
    (name, shape, dtype, ties)
    for name in (*CRITERIA, "vicreg")
    for shape in SHAPES
    for dtype in TOLERANCES
    for ties in (False, True)
    if shape != "blocks" or name in ("e2mc", "vicreg")
]


def embeddings(shape: str, dtype: torch.dtype, ties: bool) -> Tensor:
    """Correlated embeddings; of those with ties, one view has a dimension that is constant."""
    num_views, num_samples, num_dims = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(num_views, num_samples, num_dims, generator=generator, dtype=torch.float64)
    common = torch.randn(num_views, num_samples, 1, generator=generator, dtype=torch.float64)
    z = own + 0.7 * common + 0.2
    if ties:
        z = z.mul(2).round() / 2
        z[0, :, 0] = 0.5 if num_dims > 1 else z[0, :, 0]
    return z.to(dtype)


def evaluate(name: str, z: Tensor, form: str) -> RegularizerOutput | ObjectiveOutput:
    if name == "vicreg":
        return VICReg(4, 8).score(z)
    criterion = CRITERIA[name]()
    criterion.set_progress(Progress(step=7))
    return criterion.forward_local(z) if form == "local" else criterion(all_gather(z, dim=1))


def on_a_share(name: str, shape: str, dtype: torch.dtype, ties: bool, form: str) -> dict[str, Any]:
    """Loss, terms, and gradient of this process' samples, averaged as DistributedDataParallel does."""
    z = embeddings(shape, dtype, ties).chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
    output = evaluate(name, z, form)
    gradient = torch.zeros_like(z)
    if output.loss.requires_grad:
        (gradient,) = torch.autograd.grad(output.loss, z)
    return {"loss": output.loss.detach(), "terms": output.terms, "gradient": gradient / world_size()}


def exchange(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """This process' share of the dimensions, and the gradient of all shares for its samples; whole on one process."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = whole.chunk(world_size(), dim=-2)[rank()].clone().requires_grad_()
    share = share_dimensions(x)
    weights = torch.arange(whole.numel(), dtype=dtype).view(shape)[..., own_dimensions(shape[-1])]
    (gradient,) = torch.autograd.grad((share * weights).sum(), x)
    return {"share": share.detach(), "gradient": gradient}


def collectives() -> dict[str, int]:
    """How often each collective runs for three regularizers together, forward and backward."""
    z = embeddings("wide", torch.float32, ties=False).chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
    criterion = CRITERIA["combined"]()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(criterion.forward_local(z).loss, z)
    names = [event.name for event in profile.events()]
    return {kind: names.count(f"gloo:{kind}") for kind in ("all_to_all", "all_gather")}


def refusal() -> str:
    with pytest.raises(ValueError, match="at least 4 samples over all processes") as error:
        E2MCRegularizer().forward_local(torch.randn(2, 3 // world_size(), 8))
    return str(error.value)


EXCHANGES = [
    ((24, 37), torch.float64),
    ((2, 3, 8, 5), torch.float32),
    ((4, 1), torch.float32),
    ((4, 9), torch.bfloat16),
]


def everything() -> dict[str, Any]:
    """All that is asked of several processes, in one start of them."""
    return {
        "cases": [on_a_share(*case, form="local") for case in CASES],
        "exchanges": [exchange(*case) for case in EXCHANGES],
        "collectives": collectives() if world_size() > 1 else {},
        "refusal": refusal(),
    }


@cache
def on_one_process() -> list[dict[str, Any]]:
    return [on_a_share(*case, form="gathered") for case in CASES]


@cache
def on_two_processes() -> list[dict[str, Any]]:
    return run_on_processes(everything, 2)


def assert_same(number: int, shares: list[dict[str, Any]]) -> None:
    name, _, dtype, _ = CASES[number]
    one, tolerance = on_one_process()[number], TOLERANCES[CASES[number][2]]
    loss = sum(share["loss"] for share in shares) / len(shares)
    scale = max(1e-3, *(abs(term.item()) for term in one["terms"].values()))
    assert loss.dtype == dtype
    assert abs(loss - one["loss"]) <= tolerance * one["loss"].abs().clamp_min(scale)
    gradient = torch.cat([share["gradient"] for share in shares], dim=1)
    assert (gradient - one["gradient"]).abs().max() <= tolerance * one["gradient"].abs().max()
    for term, value in one["terms"].items():
        values = torch.stack([share["terms"][term] for share in shares])
        assert (values.mean() - value).abs() <= tolerance * max(abs(value.item()), scale * 1e-3), term
        assert term == "invariance" or (values == values[0]).all(), term
    assert name == "vicreg" or len({share["loss"].item() for share in shares}) == 1


def label(case: tuple[str, str, torch.dtype, bool]) -> str:
    return f"{case[0]}-{case[1]}-{str(case[2])[6:]}{'-ties' if case[3] else ''}"


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(label, CASES))
def test_shares_of_two_processes_make_the_criterion_of_one(number: int) -> None:
    assert_same(number, [results["cases"][number] for results in on_two_processes()])


@pytest.mark.slow
def test_shares_of_four_processes_make_the_criterion_of_one() -> None:
    results = run_on_processes(everything, 4)
    assert_exchanged(results)
    for number in range(len(CASES)):
        assert_same(number, [result["cases"][number] for result in results])


def assert_exchanged(results: list[dict[str, Any]]) -> None:
    for number, (shape, dtype) in enumerate(EXCHANGES):
        whole = exchange(shape, dtype)
        processes = [result["exchanges"][number] for result in results]
        widths = [process["share"].shape[-1] for process in processes]
        assert max(widths) - min(widths) <= 1
        assert torch.equal(torch.cat([process["share"] for process in processes], dim=-1), whole["share"])
        assert torch.equal(torch.cat([process["gradient"] for process in processes], dim=-2), whole["gradient"])


def test_an_exchange_gives_all_samples_of_some_dimensions_and_takes_the_gradient_back() -> None:
    assert_exchanged(on_two_processes())


def test_regularizers_together_exchange_and_gather_once() -> None:
    for process in on_two_processes():
        # Each of the two views there and back; what KoLeo and SIGReg gather goes back by an all-to-all as well.
        assert process["collectives"] == {"all_to_all": 5, "all_gather": 1}


def test_a_batch_too_small_is_refused_by_each_process_before_it_waits_for_another() -> None:
    for process in on_two_processes():
        assert "got 2" in process["refusal"]
