"""Two processes on half a batch each are one process on the whole: value and gradient."""

from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from e2mc_hf.distributed import all_gather, all_reduce_sum, rank, world_size
from e2mc_hf.models.batch_norm import synchronize_batch_norm
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.regularizers.e2mc import E2MCRegularizer

TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
BATCH, DIM = 32, 24


def embeddings(dtype: torch.dtype, ties: bool) -> Tensor:
    z = torch.randn(2, BATCH, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z.mul(2).round() / 2 if ties else z).to(dtype)


def share(z: Tensor) -> Tensor:
    return z.chunk(world_size(), dim=1)[rank()].clone().requires_grad_()


def criterion_on_a_share(dtype: torch.dtype, ties: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient of this process' samples, the gradient averaged as DistributedDataParallel does."""
    z = share(embeddings(dtype, ties))
    loss = E2MCRegularizer(1000, 100)(all_gather(z, dim=1)).loss + VICReg(4, 8).to(dtype).score(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient / world_size()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("ties", [False, True])
def test_criterion_on_two_processes_is_that_on_one(dtype: torch.dtype, tolerance: float, ties: bool) -> None:
    loss, gradient = criterion_on_a_share(dtype, ties)
    losses, gradients = zip(*run_on_processes(criterion_on_a_share, 2, dtype, ties), strict=True)
    assert abs(sum(losses) / 2 - loss) <= tolerance * loss.abs()
    assert (torch.cat(gradients, dim=1) - gradient).abs().max() <= tolerance * gradient.abs().max()


def collectives() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.full((2, 1, 3), float(rank()), requires_grad=True)
    gathered, total = all_gather(x, dim=1), all_reduce_sum(x)
    weights = torch.arange(6.0).reshape(1, 2, 3)
    (gather_gradient,) = torch.autograd.grad((gathered * weights).sum(), x)
    (sum_gradient,) = torch.autograd.grad(total.square().sum(), x)
    return gathered.detach(), total.detach(), gather_gradient, sum_gradient


def test_collectives_give_rank_order_sums_and_summed_gradients() -> None:
    for number, (gathered, total, gather_gradient, sum_gradient) in enumerate(run_on_processes(collectives, 2)):
        assert gathered[0, :, 0].tolist() == [0, 1]
        assert (total == 1).all()
        assert torch.equal(gather_gradient, 2 * torch.arange(6.0).reshape(2, 3)[number].expand(2, 1, 3))
        assert (sum_gradient == 4).all()


def test_collectives_on_one_process_are_the_identity() -> None:
    x = torch.randn(2, 3, 4)
    assert all_gather(x, dim=1) is x
    assert all_reduce_sum(x) is x


def train_on_a_share(architecture: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """A backbone, its expander (with batch normalization) and both criteria, trained as the Trainer does."""
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in architecture else {}
    backbone = load_backbone(architecture, from_scratch=True, image_size=32, backbone_args=options)
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": DIM}, image_size=32).to(dtype)
    model = synchronize_batch_norm(model, torch.device("cpu"))
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-6, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], {}
    for step in range(steps):
        batch = torch.randn(2, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        output = wrapped(list(batch.chunk(world_size(), dim=1)[rank()]))
        loss = output.loss + E2MCRegularizer(10, 1)(all_gather(output.embeddings, dim=1)).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": gradients, "weights": model.state_dict()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        ("test_resnet", torch.float64, 1e-12),
        ("test_vit", torch.float64, 1e-12),
        ("test_vit", torch.float32, 1e-5),
    ],
)
def test_model_on_two_processes_is_that_on_one(architecture: str, dtype: torch.dtype, tolerance: float) -> None:
    one = train_on_a_share(architecture, dtype, 1)
    two = run_on_processes(train_on_a_share, 2, architecture, dtype, 1)
    loss = (two[0]["losses"] + two[1]["losses"]) / 2
    assert abs(loss - one["losses"]) <= tolerance * abs(one["losses"])
    assert two[0]["gradients"].keys() == one["gradients"].keys()
    expected, gradient = flat(one["gradients"]), flat(two[0]["gradients"])
    assert (gradient - expected).norm() <= tolerance * expected.norm()


def test_float32_convolutions_on_two_processes_differ_from_one_by_no_more_than_their_rounding() -> None:
    # Batch normalization of few samples amplifies float32 rounding to more than 1e-5 on one process already.
    exact = flat(train_on_a_share("test_resnet", torch.float64, 1)["gradients"])
    single = train_on_a_share("test_resnet", torch.float32, 1)
    halves = run_on_processes(train_on_a_share, 2, "test_resnet", torch.float32, 1)
    loss = (halves[0]["losses"] + halves[1]["losses"]) / 2
    assert abs(loss - single["losses"]) <= 1e-5 * abs(single["losses"])
    one, two = flat(single["gradients"]), flat(halves[0]["gradients"])
    rounding = (one - exact).norm()
    assert rounding <= 1e-3 * exact.norm()
    assert (two - exact).norm() <= 2 * rounding


def test_weights_after_twenty_steps_on_two_processes_are_those_of_one() -> None:
    one = train_on_a_share("test_resnet", torch.float64, 20)
    two, other = run_on_processes(train_on_a_share, 2, "test_resnet", torch.float64, 20)
    for name, weight in one["weights"].items():
        assert torch.equal(two["weights"][name], other["weights"][name]), name
        assert (two["weights"][name] - weight).abs().max() <= 1e-10 * max(1.0, weight.abs().max().item()), name
