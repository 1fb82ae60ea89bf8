"""SwAV and DINO on two processes with half a batch each are those on one process: value, gradient and state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from e2mc_hf.distributed import all_gather, rank, world_size
from e2mc_hf.models.batch_norm import synchronize_batch_norm
from e2mc_hf.objectives.dino import DINO
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.prototypes import renormalize
from e2mc_hf.objectives.sinkhorn import sinkhorn
from e2mc_hf.objectives.swav import SwAV
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.progress import Progress

BATCH, FEATURES, DIM, PROTOTYPES, VIEWS = 16, 12, 8, 10, 4
STEPS, SAVED_AFTER = 6, 4
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "swav": lambda: SwAV(FEATURES, DIM, 16, PROTOTYPES),
    "swav_queue": lambda: SwAV(FEATURES, DIM, 16, PROTOTYPES, queue_length=2 * BATCH),
    "dino_mean": lambda: DINO(FEATURES, DIM, 16, PROTOTYPES, norm=True),
    "dino_sinkhorn": lambda: DINO(FEATURES, DIM, 16, PROTOTYPES, norm=True, centering="sinkhorn"),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
CASES = [(name, dtype) for name in OBJECTIVES for dtype in TOLERANCES]


def train_on_a_share(
    name: str, dtype: torch.dtype, start: int = 0, state: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Optimizer steps on this process' samples; prototypes are frozen for the first two."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]().to(dtype)
    if name.startswith("swav"):
        renormalize(objective.prototypes)
    if state is not None:
        objective.load_state_dict(state)
    objective = synchronize_batch_norm(objective, torch.device("cpu"))
    # Without broadcasts of buffers: each process must arrive at the same ones by itself.
    wrapped = DistributedDataParallel(objective, forward_sync_buffers=False) if world_size() > 1 else objective
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.005)
    result: dict[str, Any] = {"losses": [], "terms": [], "gradients": []}
    for step in range(start, STEPS):
        objective.set_progress(Progress(step, STEPS, 2))
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(VIEWS + 2, BATCH, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        share = batch.chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
        teacher = list(share[VIEWS:].detach()) if objective.has_teacher else None
        output = wrapped(list(share[:VIEWS]), teacher)
        regularization = all_gather(output.embeddings, dim=1).pow(3).mean()
        optimizer.zero_grad()
        (output.loss + regularization).backward()
        objective.before_optimizer_step()
        optimizer.step()
        for pair in objective.teacher_pairs():
            update_teacher(*pair, objective.teacher_momentum())
        result["losses"].append(output.loss.item())
        result["terms"].append({term: value.item() for term, value in output.terms.items()})
        result["gradients"].append(share.grad / world_size())
        if step == SAVED_AFTER - 1:
            result["saved"] = {key: value.clone() for key, value in objective.state_dict().items()}
    result["state"] = objective.state_dict()
    return result


def everything_on_a_share() -> dict[str, Any]:
    """All that is asked of two processes, in one start of them."""
    results: dict[Any, Any] = {case: train_on_a_share(*case) for case in CASES}
    results["sinkhorn"] = sinkhorn(scores().chunk(world_size())[rank()], 0.05)
    results["refusals"] = [refusal(7, 4), refusal(8, 8)]
    return results


def refusal(queue_length: int, batch: int) -> str:
    try:
        SwAV(FEATURES, DIM, 16, PROTOTYPES, queue_length=queue_length).score(torch.randn(2, batch, DIM))
    except ValueError as error:
        return str(error)
    return "none"


def scores() -> Tensor:
    return torch.randn(BATCH, PROTOTYPES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def two() -> list[dict[Any, Any]]:
    return run_on_processes(everything_on_a_share, 2)


@pytest.fixture(scope="module")
def one() -> dict[Any, Any]:
    return {case: train_on_a_share(*case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_features_are_those_of_one_process(
    one: dict[Any, Any], two: list[dict[Any, Any]], case: tuple[str, torch.dtype]
) -> None:
    tolerance, expected = TOLERANCES[case[1]], one[case]
    halves = [result[case] for result in two]
    for step in range(STEPS):
        loss = sum(half["losses"][step] for half in halves) / 2
        gradient = torch.cat([half["gradients"][step] for half in halves], dim=1)
        whole = expected["gradients"][step]
        assert loss == pytest.approx(expected["losses"][step], rel=tolerance)
        assert (gradient - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize("case", CASES)
def test_weights_buffers_and_terms_are_those_of_one_process_and_equal_on_both(
    one: dict[Any, Any], two: list[dict[Any, Any]], case: tuple[str, torch.dtype]
) -> None:
    tolerance, expected = TOLERANCES[case[1]], one[case]
    first, second = (result[case] for result in two)
    assert first["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert (first["state"][key] - value).abs().max() <= tolerance * max(1.0, value.abs().max().item()), key
    for step, terms in enumerate(expected["terms"]):
        for term, value in terms.items():
            mean = (first["terms"][step][term] + second["terms"][step][term]) / 2
            assert mean == pytest.approx(value, rel=tolerance), term


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prototypes_move_after_their_freeze_and_the_state_is_not_empty(two: list[dict[Any, Any]], name: str) -> None:
    state = two[0][name, torch.float64]["state"]
    start = train_on_a_share(name, torch.float64, STEPS)["state"]
    assert not torch.equal(state["prototypes.weight"], start["prototypes.weight"])
    if name == "swav_queue":
        assert state["queue_count"] == 2 * BATCH
        assert (state["queue"].norm(dim=-1) - 1).abs().max() < 1e-12
    if name == "dino_mean":
        assert (state["center"] != 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_saved_on_two_processes_goes_on_identically_on_one(two: list[dict[Any, Any]], name: str) -> None:
    of_two = two[0][name, torch.float64]
    continued = train_on_a_share(name, torch.float64, SAVED_AFTER, of_two["saved"])
    for key, value in continued["state"].items():
        assert (of_two["state"][key] - value).abs().max() <= 1e-12 * max(1.0, value.abs().max().item()), key
    losses = [result[name, torch.float64]["losses"][SAVED_AFTER:] for result in two]
    assert continued["losses"] == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)], rel=1e-12)


def test_codes_of_the_processes_are_rows_of_those_of_one(two: list[dict[Any, Any]]) -> None:
    together = torch.cat([result["sinkhorn"] for result in two])
    assert (together - sinkhorn(scores(), 0.05)).abs().max() <= 1e-14


def test_a_queue_that_does_not_fit_the_processes_is_refused_on_each(two: list[dict[Any, Any]]) -> None:
    for result in two:
        uneven, short = result["refusals"]
        assert "`queue_length` must be a multiple of the number of processes, 2, got 7" in uneven
        assert "`queue_length` must be 0 or at least the batch of all processes, 16, got 8" in short
