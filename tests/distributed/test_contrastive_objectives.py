"""SimCLR, Barlow Twins and BYOL on two processes with half a batch each are themselves on one with the whole."""

from functools import cache
from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch import Tensor

from e2mc_hf.distributed import all_reduce_sum, rank, world_size
from e2mc_hf.models.batch_norm import synchronize_batch_norm
from e2mc_hf.objectives.barlow_twins import BarlowTwins
from e2mc_hf.objectives.byol import BYOL, prediction_distance
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.simclr import SimCLR

NUM_SAMPLES, FEATURE_DIM = 16, 12
# Barlow Twins takes its Gram form when twice the samples are fewer than the dimensions.
DIMS = {"simclr": 8, "barlow_feature": 24, "barlow_gram": 48, "byol": 8}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}


def build(name: str) -> Objective:
    torch.manual_seed(0)
    dim = DIMS[name]
    if name == "simclr":
        return SimCLR(FEATURE_DIM, dim, 16)
    return BYOL(FEATURE_DIM, dim, 16) if name == "byol" else BarlowTwins(FEATURE_DIM, dim, 2)


def tensor(seed: int, width: int, dtype: torch.dtype) -> Tensor:
    """This process' share of two views that agree to some degree."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_SAMPLES, width)
    image, own = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = (1 + image[:1] + 0.5 * own).to(dtype)
    return whole.chunk(world_size(), dim=1)[rank()].clone().requires_grad_()


def score(objective: Objective, z: Tensor) -> Tensor:
    """Loss of given embeddings, those of the teacher among them."""
    if isinstance(objective, BYOL):
        return prediction_distance(z, tensor(2, z.shape[-1], z.dtype).detach())
    assert isinstance(objective, (SimCLR, BarlowTwins))
    return objective.score(z).loss


def embeddings_on_a_share(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradient, averaged as DistributedDataParallel does, of embeddings."""
    z = tensor(1, DIMS[name], dtype)
    loss = score(build(name), z)
    (gradient,) = torch.autograd.grad(loss, z)
    return {"loss": loss.detach(), "gradient": gradient / world_size()}


def heads_on_a_share(name: str) -> dict[str, Tensor]:
    """Loss, and gradients of features and weights, through heads with batch normalization."""
    objective = build(name).double()
    synchronize_batch_norm(objective, torch.device("cpu"))
    features = tensor(1, FEATURE_DIM, torch.float64)
    teacher = list(tensor(2, FEATURE_DIM, torch.float64).detach()) if objective.has_teacher else None
    output: ObjectiveOutput = objective(list(features), teacher)
    output.loss.backward()
    assert features.grad is not None
    weights = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    return {
        "loss": output.loss.detach(),
        "gradient": features.grad / world_size(),
        "weights": all_reduce_sum(weights) / world_size(),
        "statistics": torch.cat([b.flatten().double() for name, b in objective.named_buffers() if "running" in name]),
    }


def everything() -> dict[str, Any]:
    """One start of the processes for all comparisons."""
    results: dict[str, Any] = {f"{name}, heads": heads_on_a_share(name) for name in DIMS}
    for name in DIMS:
        results |= {f"{name}, {kind}": embeddings_on_a_share(name, dtype) for kind, dtype in DTYPES.items()}
    return results


@cache
def on_one_and_two() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return everything(), run_on_processes(everything, 2)


def assert_equal(case: str, tolerance: float) -> None:
    one, two = on_one_and_two()[0][case], [result[case] for result in on_one_and_two()[1]]
    loss = (two[0]["loss"] + two[1]["loss"]) / 2
    assert abs(loss - one["loss"]) <= tolerance * one["loss"].abs()
    gradient = torch.cat([two[0]["gradient"], two[1]["gradient"]], dim=1)
    assert (gradient - one["gradient"]).abs().max() <= tolerance * one["gradient"].abs().max()
    for name in one.keys() - {"loss", "gradient"}:
        for process in two:
            assert (process[name] - one[name]).abs().max() <= tolerance * one[name].abs().max(), name


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", DIMS)
def test_loss_and_gradient_of_embeddings_on_two_processes_are_those_on_one(name: str, kind: str) -> None:
    assert_equal(f"{name}, {kind}", TOLERANCES[kind])


@pytest.mark.parametrize("name", DIMS)
def test_loss_gradients_and_statistics_of_heads_on_two_processes_are_those_on_one(name: str) -> None:
    assert_equal(f"{name}, heads", TOLERANCES["float64"])
