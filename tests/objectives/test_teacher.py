from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.drop import DropPath
from torch import nn

from e2mc_hf.models.batch_norm import GlobalBatchNorm
from e2mc_hf.objectives.teacher import TeacherBuffers, freeze, set_teacher_mode, update_teacher


def network(seed: int) -> nn.Sequential:
    """A module with weights, biases, running statistics and dropout."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for name, buffer in module.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(seed)
            else:
                buffer.uniform_(1, 2)
    return module


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Student and teacher with weights of their own."""
    teacher = network(2)
    freeze(teacher)
    return network(1), teacher


@settings(max_examples=50)
@given(momentum=st.floats(0, 1))
def test_parameters_move_towards_the_students_by_one_minus_the_momentum(momentum: float) -> None:
    student, teacher = (module.double() for module in pair())
    before = deepcopy(teacher)
    update_teacher(student, teacher, momentum)
    for new, old, theirs in zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs.detach(), rtol=1e-12, atol=1e-12)


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student_bit_for_bit() -> None:
    student, teacher = pair()
    before = deepcopy(teacher.state_dict())
    update_teacher(student, teacher, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    update_teacher(student, teacher, 0.0)
    for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_distance_to_a_student_at_rest_falls_by_the_momentum_each_step() -> None:
    student, teacher = (module.double() for module in pair())
    start = teacher[0].weight - student[0].weight
    for _ in range(100):
        update_teacher(student, teacher, 0.97)
    torch.testing.assert_close(teacher[0].weight - student[0].weight, 0.97**100 * start, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("buffers", ["own", "average", "copy"])
def test_buffers_are_left_averaged_or_copied(buffers: TeacherBuffers) -> None:
    student, teacher = pair()
    old, theirs = teacher[1].running_var.clone(), student[1].running_var
    update_teacher(student, teacher, 0.75, buffers)
    expected = {"own": old, "average": 0.75 * old + 0.25 * theirs, "copy": theirs}[buffers]
    torch.testing.assert_close(teacher[1].running_var, expected)
    # A count cannot be averaged.
    assert teacher[1].num_batches_tracked == (2 if buffers == "own" else 1)


@pytest.mark.parametrize("buffers", ["own", "average", "copy"])
def test_the_student_is_left_alone(buffers: TeacherBuffers) -> None:
    student, teacher = pair()
    before = deepcopy(student.state_dict())
    update_teacher(student, teacher, 0.5, buffers)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    teacher[0].weight.data.zero_()
    teacher[1].running_var.zero_()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_update_leaves_no_gradient_and_the_teacher_frozen() -> None:
    student, teacher = pair()
    student(torch.randn(5, 3)).sum().backward()
    update_teacher(student, teacher, 0.5, "average")
    for parameter in teacher.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter.grad_fn is None


def test_parameters_are_matched_by_name_and_not_by_order() -> None:
    student = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    teacher = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    update_teacher(student, teacher, 0.0)
    assert torch.equal(teacher["a"].weight, student["a"].weight)
    assert torch.equal(teacher["b"].weight, student["b"].weight)


def test_a_float32_teacher_averages_a_bfloat16_student_in_float32() -> None:
    student, teacher = pair()
    old = teacher[0].weight.clone()
    student.bfloat16()
    update_teacher(student, teacher, 0.999)
    expected = 0.999 * old + 0.001 * student[0].weight.float()
    torch.testing.assert_close(teacher[0].weight, expected, rtol=1e-6, atol=1e-7)


def test_freeze_takes_every_parameter_out_of_the_gradient_and_returns_the_teacher() -> None:
    module = network(0)
    assert freeze(module) is module
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_takes_batch_statistics_when_training_but_never_drops_anything(training: bool) -> None:
    norms: list[nn.Module] = [nn.BatchNorm1d(4), GlobalBatchNorm(nn.BatchNorm1d(4)), nn.SyncBatchNorm(4)]
    drops: list[nn.Module] = [nn.Dropout(0.5), DropPath(0.5)]
    teacher = nn.Sequential(*norms, *drops).train(not training)
    set_teacher_mode(teacher, training)
    assert [norm.training for norm in norms] == [training] * 3
    assert not any(drop.training for drop in drops)


def test_a_training_teacher_normalizes_by_the_batch_and_gathers_statistics_of_its_own() -> None:
    _, teacher = pair()
    set_teacher_mode(teacher, True)
    x = torch.randn(16, 3)
    with torch.no_grad():
        first, second = teacher(x), teacher(x)
    assert torch.equal(first, second)  # no dropout
    batch = teacher[0](x)
    normalized = (batch - batch.mean(dim=0)) / (batch.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(first, teacher[3](normalized * teacher[1].weight + teacher[1].bias))
    assert teacher[1].num_batches_tracked == 4
