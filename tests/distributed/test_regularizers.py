"""Every regularizer on two processes is what it is on one: value and gradient."""

from functools import cache

import pytest
import torch
from processes import run_on_processes
from torch import Tensor

from e2mc_hf.distributed import all_gather, rank, world_size
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.registry import REGULARIZERS, build_regularizer
from e2mc_hf.regularizers.regularizer import Regularizer

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
FORMS = ("gathered", "local")
CASES = [
    (name, dtype, ties, form)
    for name in sorted(REGULARIZERS)
    for dtype in TOLERANCES
    for ties in (False, True)
    for form in FORMS
]


def embeddings(dtype: torch.dtype, ties: bool) -> Tensor:
    z = torch.randn(2, 32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z.mul(2).round() / 2 if ties else z).to(dtype)


def every_case_on_a_share() -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of this process' samples, the gradient averaged as DistributedDataParallel does."""
    results = []
    for name, dtype, ties, form in CASES:
        z = embeddings(dtype, ties).chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
        regularizer = build_regularizer(name, {})
        regularizer.set_progress(Progress(step=3))
        assert isinstance(regularizer, Regularizer)
        output = regularizer.forward_local(z) if form == "local" else regularizer(all_gather(z, dim=1))
        loss = output.loss
        (gradient,) = torch.autograd.grad(loss, z)
        results.append((loss.detach(), gradient / world_size()))
    return results


@cache
def results() -> tuple[list[tuple[Tensor, Tensor]], list[list[tuple[Tensor, Tensor]]]]:
    return every_case_on_a_share(), run_on_processes(every_case_on_a_share, 2)


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{n}-{str(d)[6:]}-{'ties' if t else ''}-{f}" for n, d, t, f in CASES]
)
def test_regularizer_on_two_processes_is_that_on_one(case: int) -> None:
    one, two = results()
    loss, gradient = one[case]
    tolerance = TOLERANCES[CASES[case][1]]
    assert abs(sum(share[case][0] for share in two) / 2 - loss) <= tolerance * loss.abs()
    together = torch.cat([share[case][1] for share in two], dim=1)
    assert (together - gradient).abs().max() <= tolerance * gradient.abs().max()
