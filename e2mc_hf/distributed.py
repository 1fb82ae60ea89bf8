"""What several processes need of each other; on one process every function is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all processes along `dim`, in rank order, with gradient.

    Every process must then compute the same loss from the result: the gradients that come back are summed over the
    processes, and the mean that DistributedDataParallel takes makes them those of one process on the whole batch.

    Args:
        x: Tensor of the same shape on every process.
        dim: Dimension of the samples.

    Returns:
        Tensor with world_size times the entries along `dim`; `x` itself on one process.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x.movedim(dim, 0))
    return gathered.movedim(0, dim)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, with gradient; `x` itself on one process."""
    if world_size() == 1:
        return x
    total: Tensor = _AllReduceSum.apply(x)
    return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad_gathered: Tensor) -> Tensor:
        gradient = grad_gathered.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Tensor:
        gradient = grad_total.clone()
        dist.all_reduce(gradient)
        return gradient
