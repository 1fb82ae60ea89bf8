from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.objectives.prototypes import renormalize
from e2mc_hf.objectives.swav import SwAV
from e2mc_hf.progress import Progress

Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]
FEATURES, DIM, PROTOTYPES = 5, 6, 7


def swav(**options: Any) -> SwAV:
    objective = SwAV(FEATURES, DIM, 8, PROTOTYPES, **options).double()
    renormalize(objective.prototypes)
    return objective


def views(number: int = 2, batch: int = 4, width: int = DIM) -> Tensor:
    return torch.randn(number, batch, width, dtype=torch.float64)


def naive_codes(scores: Tensor) -> Tensor:
    plan = (scores / 0.05).exp()
    for _ in range(3):
        plan = plan / plan.sum(dim=0)
        plan = plan / plan.sum(dim=1, keepdim=True)
    return plan


def naive_loss(embeddings: Tensor, prototypes: Tensor, queue: Tensor) -> Tensor:
    """The equations, one view, sample and prototype at a time; `queue` (2, L, D)."""
    num_views, batch, _ = embeddings.shape
    unit = [[z / z.norm() for z in view] for view in embeddings]
    total = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        rows = torch.stack([*unit[t], *queue[t]])
        codes = naive_codes(rows.detach() @ prototypes.detach().T)
        for v in range(num_views):
            for b in range(batch):
                exponentials = [torch.exp(unit[v][b] @ c / 0.1) for c in prototypes]
                for k, exponential in enumerate(exponentials):
                    if v != t:
                        total = total - codes[b, k] * torch.log(exponential / sum(exponentials))
    return total / (2 * (num_views - 1) * batch)


@pytest.mark.parametrize("case", ["more_samples", "more_dims", "wide_scale"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradient_are_the_authors(golden: Golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    values, arrays = golden(case)
    num_prototypes, dim = arrays["swav.prototypes"].shape
    objective = SwAV(FEATURES, dim, 8, num_prototypes).to(dtype)
    objective.prototypes.weight.data.copy_(arrays["swav.prototypes"])
    embeddings = torch.stack([arrays["x"], arrays["y"]]).to(dtype).requires_grad_()
    output = objective.score(embeddings)
    (gradient,) = torch.autograd.grad(output.loss, embeddings)
    expected = arrays["swav.grad_x"]
    assert output.loss.item() == pytest.approx(values["swav.loss_two_views"], rel=tolerance)
    assert (gradient[0].double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("num_views", [2, 3, 5])
@pytest.mark.parametrize("queue_length", [0, 8])
def test_loss_and_gradients_are_those_of_the_equations(num_views: int, queue_length: int) -> None:
    objective = swav(queue_length=queue_length)
    queue = torch.zeros(2, 0, DIM, dtype=torch.float64)
    if queue_length:
        filling = views(2, 8)
        objective.score(filling)
        queue = F.normalize(filling, dim=-1)
    embeddings = views(num_views).requires_grad_()
    inputs = [embeddings, objective.prototypes.weight]
    expected = naive_loss(embeddings, objective.prototypes.weight, queue)
    output = objective.score(embeddings)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert output.terms["swapped_prediction"] == output.loss
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-12


def test_projector_has_the_layers_and_names_of_the_authors() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in SwAV(16, 128, 32, 20).state_dict().items()}
    assert shapes.pop("prototypes.weight") == (20, 128)
    assert {name: shape for name, shape in shapes.items() if "running" not in name and "tracked" not in name} == {
        "projector.0.weight": (32, 16),
        "projector.0.bias": (32,),
        "projector.1.weight": (32,),
        "projector.1.bias": (32,),
        "projector.3.weight": (128, 32),
        "projector.3.bias": (128,),
    }


def test_views_are_projected_as_one_batch_and_only_the_large_ones_are_handed_on() -> None:
    objective = swav()
    features = list(views(8, 4, FEATURES))
    output = objective(features)
    together = objective.projector(torch.cat(features))
    assert output.embeddings.shape == (2, 4, DIM)
    assert torch.equal(output.embeddings.flatten(0, 1), together[:8])
    assert output.embeddings.requires_grad
    assert output.embeddings.norm(dim=-1).sub(1).abs().max() > 0.01


def test_a_single_view_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_views` must be at least 2 for swav, got 1"):
        swav()([torch.randn(4, FEATURES)])


def test_queue_holds_the_latest_large_views_in_order_and_counts_them() -> None:
    objective = swav(queue_length=10)
    rows: list[Tensor] = []
    for batch in (4, 4, 3, 4):
        embeddings = views(3, batch)
        objective.score(embeddings)
        rows += list(F.normalize(embeddings[:2], dim=-1).unbind(dim=1))
        assert objective.queue_count == min(len(rows), 10)
        kept = torch.stack(rows[-10:], dim=1)
        assert torch.equal(objective.queue[:, 10 - kept.shape[1] :], kept)


def test_queue_takes_part_once_it_is_full_and_not_before() -> None:
    with_queue, without = swav(queue_length=8), swav()
    without.prototypes.weight.data.copy_(with_queue.prototypes.weight)
    batches = [views(), views(), views()]
    same = [bool(with_queue.score(batch).loss == without.score(batch).loss) for batch in batches]
    assert same == [True, True, False]


def test_queue_is_read_but_not_changed_in_evaluation() -> None:
    objective = swav(queue_length=8)
    objective.score(views(2, 8))
    before = objective.queue.clone()
    objective.eval()
    loss = objective.score(views(2, 16)).loss
    assert loss.isfinite()
    assert torch.equal(objective.queue, before)


def test_a_restored_state_goes_on_where_it_was_saved() -> None:
    objective, restored = swav(queue_length=8), swav(queue_length=8)
    for _ in range(3):
        objective.score(views())
    restored.load_state_dict(objective.state_dict())
    for _ in range(3):
        batch = views()
        assert torch.equal(restored.score(batch).loss, objective.score(batch).loss)
    assert torch.equal(restored.queue, objective.queue)
    assert "queue" not in swav().state_dict()


def test_gradient_through_a_second_step_is_free_of_the_first() -> None:
    objective = swav(queue_length=4)
    first = views().requires_grad_()
    objective.score(first)
    objective.score(views().requires_grad_()).loss.backward()
    assert first.grad is None
    assert not objective.queue.requires_grad


@pytest.mark.parametrize(("epochs", "frozen_steps"), [(0.0, 0), (0.5, 2), (1.0, 3), (2.0, 6)])
def test_prototypes_stand_still_for_the_stated_time_of_this_run_and_then_move(epochs: float, frozen_steps: int) -> None:
    objective = swav(freeze_prototypes_epochs=epochs)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = []
    for step in range(8):
        objective.set_progress(Progress(step, 8, 3))
        before = objective.prototypes.weight.clone()
        optimizer.zero_grad()
        objective(list(views(3, 4, FEATURES))).loss.backward()
        objective.before_optimizer_step()
        optimizer.step()
        moved.append(not torch.equal(objective.prototypes.weight, before))
    assert moved == [False] * frozen_steps + [True] * (8 - frozen_steps)


def test_the_first_epoch_is_frozen_by_default() -> None:
    assert SwAV(FEATURES, DIM, 8, PROTOTYPES).freeze_prototypes_epochs == 1


def test_prototypes_are_back_at_unit_norm_in_the_forward_after_a_step() -> None:
    objective = swav(freeze_prototypes_epochs=0.0)
    optimizer = torch.optim.SGD(objective.parameters(), lr=10.0)
    objective(list(views(2, 4, FEATURES))).loss.backward()
    optimizer.step()
    norms = objective.prototypes.weight.norm(dim=1)
    directions = objective.prototypes.weight / norms[:, None]
    assert (norms - 1).abs().max() > 1e-3
    objective(list(views(2, 4, FEATURES)))
    assert (objective.prototypes.weight - directions).abs().max() <= 1e-15


def test_evaluation_counts_prototypes_with_unit_norm_and_leaves_them() -> None:
    objective, embeddings = swav().eval(), views()
    expected = objective.score(embeddings).loss
    objective.prototypes.weight.data.mul_(3)
    before = objective.prototypes.weight.clone()
    assert objective.score(embeddings).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(objective.prototypes.weight, before)


def test_two_forwards_may_come_before_one_backward() -> None:
    objective = swav()
    objective.prototypes.weight.data.mul_(3)
    (objective.score(views()).loss + objective.score(views()).loss).backward()
    assert objective.prototypes.weight.grad.isfinite().all()


@pytest.mark.parametrize("embeddings", [torch.zeros(3, 8, DIM), torch.ones(3, 8, DIM), 1e4 * torch.ones(3, 8, DIM)])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(embeddings: Tensor) -> None:
    objective, embeddings = swav().float(), embeddings.requires_grad_()
    loss = objective.score(embeddings).loss
    gradients = torch.autograd.grad(loss, [embeddings, objective.prototypes.weight])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_loss_is_float32_under_autocast_and_the_same() -> None:
    objective, embeddings = swav(queue_length=8).float(), views(3, 8).float()
    objective.score(embeddings)
    objective.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective.score(embeddings)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, objective.score(embeddings).loss)


def test_terms_tell_collapse_onto_one_code_from_shared_ones() -> None:
    objective = SwAV(FEATURES, 4, 8, 4, sinkhorn_iterations=20).double()
    objective.prototypes.weight.data.copy_(torch.eye(4))
    spread = objective.score(torch.eye(4, dtype=torch.float64).repeat(2, 2, 1)).terms
    collapsed = objective.score(torch.ones(2, 8, 4, dtype=torch.float64)).terms
    assert spread["prototypes_used"] == 4
    assert spread["code_entropy"] < 1e-6
    assert collapsed["prototypes_used"] == 1
    assert collapsed["code_entropy"].item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    assert not any(term.requires_grad for term in spread.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"sinkhorn_temperature": -0.05}, "`sinkhorn_temperature` must be above 0, got -0.05"),
        ({"sinkhorn_iterations": 0}, "`sinkhorn_iterations` must be at least 1, got 0"),
        ({"num_prototypes": 1}, "`num_prototypes` must be at least 2, got 1"),
        ({"hidden_dim": 0}, "`hidden_dim` must be at least 1, got 0"),
        ({"queue_length": -1}, "`queue_length` must be at least 0, got -1"),
        ({"freeze_prototypes_epochs": float("nan")}, "`freeze_prototypes_epochs` must be at least 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwAV(FEATURES, **options)


def test_a_queue_shorter_than_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="`queue_length` must be 0 or at least the batch of all processes, 8, got 4"):
        swav(queue_length=4)(list(views(2, 8, FEATURES)))
    with pytest.raises(ValueError, match="`queue_length` must be 0 or at least the batch of all processes, 5, got 4"):
        swav(queue_length=4).check_batch(5)
    swav(queue_length=4).check_batch(4)
    swav().check_batch(4096)
