"""SimSiam and MEC on two processes of half a batch each are the same on one process of the whole."""

from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch import Tensor

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.models.batch_norm import synchronize_batch_norm
from e2mc_hf.objectives.mec import MEC
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.simsiam import SimSiam

BATCH, FEATURES, DIM = 32, 12, 24
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
OBJECTIVES: dict[str, tuple[type[Objective], dict[str, Any]]] = {
    "simsiam": (SimSiam, {}),
    "mec": (MEC, {"lambda_warmup_epochs": 0}),
    "mec_feature": (MEC, {"lambda_warmup_epochs": 0, "form": "feature", "order": 5}),
    "mec_exact": (MEC, {"exact": True, "eps_d_squared": 0.5}),
}


def score_a_share(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, embeddings and the gradient of this process' features, averaged as DistributedDataParallel does."""
    torch.manual_seed(0)
    kind, options = OBJECTIVES[name]
    objective = kind(FEATURES, DIM, 6, **options)
    synchronize_batch_norm(objective, torch.device("cpu")).to(dtype)
    whole = torch.randn(4, BATCH, FEATURES, dtype=torch.float64).to(dtype)
    features = whole.chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
    output = objective(list(features[:2]), list(features[2:]) if kind.has_teacher else None)
    loss = output.loss + 1e-2 * output.embeddings.pow(3).mean()
    (gradient,) = torch.autograd.grad(loss, features)
    return output.loss.detach(), output.embeddings.detach(), gradient / world_size()


def score_all() -> dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor]]:
    return {(name, dtype): score_a_share(name, dtype) for name in OBJECTIVES for dtype in TOLERANCES}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor]]]:
    return run_on_processes(score_all, 2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_embeddings_and_gradient_on_two_processes_are_those_on_one(
    two_processes: Any, name: str, dtype: torch.dtype
) -> None:
    tolerance = TOLERANCES[dtype]
    loss, embeddings, gradient = score_a_share(name, dtype)
    losses, halves, gradients = zip(*(results[name, dtype] for results in two_processes), strict=True)
    assert gradient[:2].abs().max() > 0
    assert abs(sum(losses) / 2 - loss) <= tolerance * loss.abs()
    assert (torch.cat(halves, dim=1) - embeddings).abs().max() <= tolerance * embeddings.abs().max()
    assert (torch.cat(gradients, dim=1) - gradient).abs().max() <= tolerance * gradient.abs().max()
    if name.startswith("mec"):
        assert losses[0] == losses[1]
        assert (gradient[2:] == 0).all()
