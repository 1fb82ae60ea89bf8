import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2mc_hf.objectives.dino import DINO
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.progress import Progress

FEATURES, DIM, PROTOTYPES = 5, 6, 7


def dino(**options: Any) -> DINO:
    objective = DINO(FEATURES, DIM, 8, PROTOTYPES, **options).double()
    objective.teacher_prototypes.weight.data.add_(0.3 * torch.randn(PROTOTYPES, DIM))
    return objective


def views(number: int = 2, batch: int = 4, width: int = DIM) -> Tensor:
    return torch.randn(number, batch, width, dtype=torch.float64)


def naive_softmax(logits: Tensor) -> list[Tensor]:
    exponentials = [torch.exp(logit) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def naive_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    plan = (scores / temperature).exp()
    for _ in range(3):
        plan = plan / plan.sum(dim=0)
        plan = plan / plan.sum(dim=1, keepdim=True)
    return plan


def naive_loss(objective: DINO, z: Tensor, teacher_z: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The equations, one view, sample and prototype at a time."""
    prototypes = [row / row.norm() for row in objective.prototypes.weight]
    teacher_prototypes = [row / row.norm() for row in objective.teacher_prototypes.weight]
    num_views, batch, _ = z.shape
    teacher_scores = torch.stack(
        [
            torch.stack([row @ sample / sample.norm() for row in teacher_prototypes])
            for view in teacher_z
            for sample in view
        ]
    )
    if objective.centering == "sinkhorn":
        targets = naive_sinkhorn(teacher_scores, temperature)
    else:
        targets = torch.stack([torch.stack(naive_softmax((row - center) / temperature)) for row in teacher_scores])
    total = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        for v in range(num_views):
            for b in range(batch):
                scores = torch.stack([row @ z[v, b] / z[v, b].norm() for row in prototypes])
                for k, probability in enumerate(naive_softmax(scores / 0.1)):
                    if v != t:
                        total = total - targets[t * batch + b, k].detach() * probability.log()
    return total / (2 * (num_views - 1) * batch)


@pytest.mark.parametrize("num_views", [2, 3, 5])
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_loss_and_gradients_are_those_of_the_equations(num_views: int, centering: str) -> None:
    objective = dino(centering=centering)
    objective.center.copy_(0.1 * torch.randn(PROTOTYPES))
    center = objective.center.clone()
    z, teacher_z = views(num_views).requires_grad_(), views().requires_grad_()
    inputs = [z, objective.prototypes.weight]
    expected = naive_loss(objective, z, teacher_z, center, 0.04)
    output = objective.score(z, teacher_z)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert output.terms["self_distillation"] == output.loss
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, inputs, retain_graph=True), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-12
    assert torch.autograd.grad(output.loss, teacher_z, allow_unused=True) == (None,)


def test_center_is_the_running_mean_of_the_teachers_scores_and_moves_after_the_loss() -> None:
    objective, expected = dino(center_momentum=0.8), torch.zeros(PROTOTYPES, dtype=torch.float64)
    for _ in range(4):
        z, teacher_z = views(3), views()
        loss = naive_loss(objective, z, teacher_z, expected, 0.04)
        assert objective.score(z, teacher_z).loss.item() == pytest.approx(loss.item(), rel=1e-12)
        rows = nn.functional.normalize(objective.teacher_prototypes.weight, dim=1)
        scores = [rows @ (sample / sample.norm()) for view in teacher_z for sample in view]
        expected = 0.8 * expected + 0.2 * sum(scores) / len(scores)
        assert (objective.center - expected).abs().max() <= 1e-15


@pytest.mark.parametrize(("centering", "training"), [("mean", False), ("sinkhorn", True)])
def test_center_stays_in_evaluation_and_with_sinkhorn(centering: str, training: bool) -> None:
    objective = dino(centering=centering).train(training)
    objective.score(views(), views())
    assert (objective.center == 0).all()


def test_a_restored_state_goes_on_where_it_was_saved() -> None:
    objective, restored = dino(), dino()
    for _ in range(3):
        objective.score(views(), views())
    restored.load_state_dict(objective.state_dict())
    z, teacher_z = views(), views()
    assert torch.equal(restored.score(z, teacher_z).loss, objective.score(z, teacher_z).loss)


@pytest.mark.parametrize(("epoch", "temperature"), [(0.0, 0.04), (1.0, 0.045), (5.0, 0.065), (6.0, 0.07), (9.0, 0.07)])
def test_teachers_temperature_rises_on_a_line_from_the_start_of_the_run(epoch: float, temperature: float) -> None:
    objective = dino(teacher_temperature_warmup_epochs=6.0)
    objective.set_progress(Progress(int(epoch * 10), 100, 10))
    z, teacher_z = views(), views()
    expected = naive_loss(objective, z, teacher_z, objective.center.clone(), temperature)
    assert objective.score(z, teacher_z).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_defaults_are_the_papers() -> None:
    objective = DINO(FEATURES, 8, 8, 16)
    schedule = [objective.progress.linear(0.04, 0.07, objective.teacher_temperature_warmup_epochs)]
    objective.set_progress(Progress(30, 100, 1))
    schedule.append(objective.progress.linear(0.04, 0.07, objective.teacher_temperature_warmup_epochs))
    assert schedule == [0.04, 0.07]
    assert (objective.temperature, objective.center_momentum, objective.freeze_prototypes_epochs) == (0.1, 0.9, 1)
    assert objective.default_small_views == 8


def test_teachers_momentum_rises_from_its_start_to_one_on_half_a_cosine() -> None:
    objective = dino()
    momenta = []
    for step in (0, 50, 100):
        objective.set_progress(Progress(step, 101, 10))
        momenta.append(objective.teacher_momentum())
    assert momenta == pytest.approx([0.996, 0.998, 1.0], abs=1e-15)


def test_teacher_starts_as_the_student_frozen_and_both_heads_follow_it() -> None:
    objective = DINO(FEATURES, DIM, 8, PROTOTYPES)
    teacher = [*objective.teacher_projector.parameters(), *objective.teacher_prototypes.parameters()]
    student = [*objective.projector.parameters(), *objective.prototypes.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(teacher, student, strict=True))
    assert not any(parameter.requires_grad for parameter in teacher)
    for parameter in student:
        parameter.data.add_(1.0)
    before = [parameter.clone() for parameter in teacher]
    for own, theirs in objective.teacher_pairs():
        update_teacher(own, theirs, 0.75)
    for old, new in zip(before, teacher, strict=True):
        assert (new - old - 0.25).abs().max() <= 1e-6


def test_projector_is_three_layers_with_gelu_and_small_normal_weights() -> None:
    objective = DINO(64, 32, 256, 16)
    kinds = [type(module) for module in objective.projector]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    for layer in objective.projector[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()
    assert [m.out_features for m in objective.projector[::2]] == [256, 256, 32]


def test_batch_norm_of_the_teacher_counts_the_batch_in_training_and_not_in_evaluation() -> None:
    objective = dino(norm=True).train()
    norms = [m for m in objective.teacher_projector.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert [norm.training for norm in norms] == [True, True]
    assert not objective.teacher_projector.training
    objective.eval()
    assert [norm.training for norm in norms] == [False, False]


def test_views_are_projected_as_one_batch_and_only_the_large_ones_are_handed_on() -> None:
    objective = dino(norm=True)
    features = list(views(10, 4, FEATURES))
    output = objective(features, list(views(2, 4, FEATURES)))
    together = objective.projector(torch.cat(features))
    assert output.embeddings.shape == (2, 4, DIM)
    assert torch.equal(output.embeddings.flatten(0, 1), together[:8])
    assert output.embeddings.requires_grad


def test_heads_of_the_teacher_score_its_features() -> None:
    objective = dino().eval()
    features, teacher_features = views(3, 4, FEATURES), views(2, 4, FEATURES)
    expected = objective.score(objective.projector(features), objective.teacher_projector(teacher_features))
    output = objective(list(features), list(teacher_features))
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)


def test_norm_of_prototypes_does_not_count() -> None:
    objective = dino().eval()
    z, teacher_z = views(), views()
    expected = objective.score(z, teacher_z).loss.item()
    for prototypes in (objective.prototypes, objective.teacher_prototypes):
        prototypes.weight.data.mul_(torch.rand(PROTOTYPES, 1) + 0.5)
    assert objective.score(z, teacher_z).loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epochs", "frozen_steps"), [(0.0, 0), (1.0, 3)])
def test_prototypes_stand_still_for_the_stated_time_of_this_run_and_then_move(epochs: float, frozen_steps: int) -> None:
    objective = dino(freeze_prototypes_epochs=epochs)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    moved = []
    for step in range(6):
        objective.set_progress(Progress(step, 6, 3))
        before = objective.prototypes.weight.clone()
        optimizer.zero_grad()
        objective(list(views(3, 4, FEATURES)), list(views(2, 4, FEATURES))).loss.backward()
        objective.before_optimizer_step()
        optimizer.step()
        moved.append(not torch.equal(objective.prototypes.weight, before))
    assert moved == [False] * frozen_steps + [True] * (6 - frozen_steps)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("embeddings", [torch.zeros(3, 8, DIM), torch.ones(3, 8, DIM), 1e4 * torch.ones(3, 8, DIM)])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(embeddings: Tensor, centering: str) -> None:
    objective, embeddings = dino(centering=centering).float(), embeddings.requires_grad_()
    loss = objective.score(embeddings, embeddings[:2].detach()).loss
    gradients = torch.autograd.grad(loss, [embeddings, objective.prototypes.weight])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_loss_is_float32_under_autocast_and_the_same(centering: str) -> None:
    objective = dino(centering=centering).float().eval()
    z, teacher_z = views(3).float(), views().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective.score(z, teacher_z)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, objective.score(z, teacher_z).loss)


def test_terms_tell_the_entropy_of_the_teacher_and_the_prototypes_it_uses() -> None:
    objective = DINO(FEATURES, 4, 8, 4, teacher_temperature_start=0.01).double()
    objective.teacher_prototypes.weight.data.copy_(torch.eye(4))
    basis = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    sharp = objective.eval().score(basis, basis).terms
    flat = objective.score(basis, torch.ones_like(basis)).terms
    assert (sharp["prototypes_used"], flat["prototypes_used"]) == (4, 1)
    assert sharp["teacher_entropy"] < 1e-6
    assert flat["teacher_entropy"].item() == pytest.approx(math.log(4), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"teacher_temperature": -1.0}, "`teacher_temperature` must be above 0, got -1.0"),
        ({"momentum": 1.5}, "`momentum` must be from 0 to 1, got 1.5"),
        ({"center_momentum": -0.1}, "`center_momentum` must be from 0 to 1, got -0.1"),
        ({"num_prototypes": 1}, "`num_prototypes` must be at least 2, got 1"),
        ({"teacher_temperature_warmup_epochs": -1.0}, "`teacher_temperature_warmup_epochs` must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DINO(FEATURES, **{"num_prototypes": 16, **options})


@pytest.mark.parametrize(("teacher_features", "got"), [(None, 0), ([torch.randn(4, FEATURES)] * 3, 3)])
def test_other_than_two_views_of_the_teacher_are_refused(teacher_features: list[Tensor] | None, got: int) -> None:
    with pytest.raises(ValueError, match=f"`teacher_features` must be those of the 2 large views, got {got}"):
        dino()([torch.randn(4, FEATURES).double()] * 2, teacher_features)
