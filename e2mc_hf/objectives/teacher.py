"""The teacher: an exponential moving average of the student's weights."""

from typing import Literal, TypeVar, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)
TeacherBuffers = Literal["own", "average", "copy"]


def check_teacher_options(momentum: float, buffers: str) -> None:
    """Refuse a momentum or a treatment of buffers that there is not.

    Raises:
        ValueError: If there is one.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must lie in [0, 1], got {momentum}. The papers' is 0.996.")
    if buffers not in get_args(TeacherBuffers):
        raise ValueError(f"`teacher_buffers` must be own, average or copy, got {buffers!r}. Leave it out for own.")


def freeze(teacher: Module) -> Module:
    """Take the teacher out of the gradient, and return it."""
    return teacher.requires_grad_(False)


def set_teacher_mode(teacher: nn.Module, training: bool) -> None:
    """Put a teacher in training mode: batch statistics as the student, but neither dropout nor stochastic depth."""
    teacher.eval()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            module.training = training


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float, buffers: TeacherBuffers = "own") -> None:
    """Move the teacher towards the student: teacher = momentum * teacher + (1 - momentum) * student.

    Args:
        student: Module that is trained.
        teacher: Module of the same structure.
        momentum: Share of the old teacher; 1 keeps it, 0 copies the student.
        buffers: What becomes of its buffers, such as running statistics: `own` leaves those it gathers itself (the
            authors' code of MEC and BYOL), `average` treats them like parameters, `copy` takes the student's.
    """
    theirs = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(theirs[name].detach().to(parameter.dtype), 1 - momentum)
    if buffers == "own":
        return
    sources = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        if buffers == "average" and buffer.is_floating_point():
            buffer.lerp_(sources[name], 1 - momentum)
        else:
            buffer.copy_(sources[name])
