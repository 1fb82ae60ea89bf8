"""What several processes need of each other; on one process every function is the identity."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


def all_gather_object(value: T) -> list[T]:
    """Collect a small picklable value from every process, in rank order; all processes must call this together."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_first(action: Callable[[], T]) -> T:
    """Run an action on the first process only, and give its result, or its error, to all of them.

    All processes must call this together. The others wait for the first as long as for any collective: up to the
    timeout of the process group. On one process it is just the call.

    Args:
        action: What to do; its result and its errors must be picklable.

    Returns:
        What the action returned, on every process.

    Raises:
        Exception: What the action raised, with the same type on every process.
    """
    if world_size() == 1:
        return action()
    error: Exception | None = None
    outcome = [b""]
    if rank() == 0:
        try:
            result = action()
            outcome = [pickle.dumps((result, None))]
        except Exception as raised:
            error = raised
            outcome = [_pickled_error(raised)]
    # Pickled here, not by the collective: what cannot be pickled would leave the others waiting.
    dist.broadcast_object_list(outcome, src=0)
    if rank() > 0:
        result, error = pickle.loads(outcome[0])
    if error is not None:
        raise error
    return result


def _pickled_error(error: Exception) -> bytes:
    """The outcome that carries an error, or its text if it does not survive pickling."""
    try:
        outcome = pickle.dumps((None, error))
        pickle.loads(outcome)
    except Exception:
        return pickle.dumps((None, RuntimeError(f"On the first process: {type(error).__name__}: {error}")))
    return outcome


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
