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


def all_reduce_in_place(x: Tensor) -> Tensor:
    """Replace a contiguous tensor by its sum over all processes, without gradient, and return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def share_dimensions(x: Tensor) -> Tensor:
    """Exchange some samples of all dimensions for all samples of some dimensions, with gradient.

    An all-to-all: of its samples every process keeps the share of one process and sends the rest, 1/W of them to each;
    the gradients return the same way. As with `all_gather`, every process must compute the same loss from the shares
    of all, so that the mean of DistributedDataParallel makes its gradients those of one process on the whole batch.

    Args:
        x: Samples (..., B, D), of the same shape on every process.

    Returns:
        The dimensions `own_dimensions(D)` of the samples of all processes, in rank order, (..., N, d); `x` itself on
        one process. With fewer dimensions than processes d is 0 on the last ones, which take part all the same.
    """
    if world_size() == 1:
        return x
    share: Tensor = _ShareDimensions.apply(x)
    return share


def own_dimensions(num_dims: int) -> slice:
    """Which of D dimensions `share_dimensions` gives to this process: D / W, the first D mod W processes one more."""
    start = sum(_dimension_counts(num_dims)[: rank()])
    return slice(start, start + _dimension_counts(num_dims)[rank()])


def _dimension_counts(num_dims: int) -> list[int]:
    """Dimensions of each process."""
    each, left = divmod(num_dims, world_size())
    return [each + (number < left) for number in range(world_size())]


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
        # A reduce-scatter, at half the bytes of an all-reduce: gloo's own sends as many as its all-reduce.
        parts = torch.empty_like(grad_gathered, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad_gathered.contiguous())
        return parts.view(world_size(), parts.shape[0] // world_size(), *parts.shape[1:]).sum(dim=0)


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


class _ShareDimensions(torch.autograd.Function):
    """Blocks (..., B, d_r), one for each process r after the other, go out; W blocks (..., B, d) come in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        outgoing = x.new_empty(x.numel())
        blocks, parts = _blocks(outgoing, x)
        for block, part in zip(blocks, parts, strict=True):
            block.copy_(part)
        incoming = x.new_empty(world_size(), *parts[rank()].shape)
        sizes = [block.numel() for block in blocks]
        dist.all_to_all_single(incoming.view(-1), outgoing, [sizes[rank()]] * world_size(), sizes)
        return incoming.movedim(0, -3).flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, grad_share: Tensor) -> Tensor:
        *leading, batch, _ = ctx.shape
        by_process = grad_share.reshape(*leading, world_size(), batch, grad_share.shape[-1])
        outgoing = by_process.movedim(-3, 0).contiguous()
        gradient = grad_share.new_empty(ctx.shape)
        incoming = grad_share.new_empty(gradient.numel())
        blocks, parts = _blocks(incoming, gradient)
        sizes = [block.numel() for block in blocks]
        dist.all_to_all_single(incoming, outgoing.view(-1), sizes, [sizes[rank()]] * world_size())
        for block, part in zip(blocks, parts, strict=True):
            part.copy_(block)
        return gradient


def _blocks(buffer: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the dimensions of each process, (..., B, d_r): blocks of a flat buffer, and parts of `x`."""
    parts = torch.split(x, _dimension_counts(x.shape[-1]), dim=-1)
    blocks = torch.split(buffer, [part.numel() for part in parts])
    return [block.view(part.shape) for block, part in zip(blocks, parts, strict=True)], list(parts)
