"""Off-diagonal covariance of a batch that no process holds whole: the number of `off_diagonal_covariance`, over ranks.

N samples and D dimensions over all processes, W processes, X the centered (N, D) sample. The two forms of
`covariance`, each with its product summed over the processes, which share the operations:

- Gram form, of shares of the dimensions: K = sum over processes of X_r X_r^T, X_r (N, d) one process' dimensions.
- feature form, of shares of the samples: (N-1) C = sum over processes of X_r^T X_r, X_r (B, D) one process' samples.

All processes get the same sum, and what it says of their own X_r is its gradient: nothing is sent back.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import all_reduce_in_place, world_size
from e2mc_hf.regularizers.covariance import sum_of_squares
from e2mc_hf.regularizers.differentiation import refuse_second_derivatives


def covariance_of_dimension_shares(
    x: Float[Tensor, "N d"], num_dims: int, *, debias: bool = False
) -> Float[Tensor, ""]:
    """Off-diagonal covariance of all dimensions in the Gram form, from this process' share of them.

    Args:
        x: All samples of the dimensions of this process, float32 or float64; d may be 0.
        num_dims: D.
        debias: As in `off_diagonal_covariance`.

    Returns:
        The same scalar on every process, each of which must use it in the same way: gradients are summed over them.
    """
    value: Tensor = _OfDimensionShares.apply(x, num_dims, debias)
    return value


def covariance_of_sample_shares(x: Float[Tensor, "B D"], *, debias: bool = False) -> Float[Tensor, ""]:
    """Off-diagonal covariance over all samples in the feature form, from this process' share of them.

    Args:
        x: Samples of this process, as many as of any other, float32 or float64.
        debias: As in `off_diagonal_covariance`.

    Returns:
        The same scalar on every process, each of which must use it in the same way: gradients are summed over them.
    """
    value: Tensor = _OfSampleShares.apply(x, debias)
    return value


class _OfDimensionShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "N d"], num_dims: int, debias: bool) -> Float[Tensor, ""]:
        num_samples = x.shape[0]
        centered = x - x.mean(dim=0)
        variance = centered.square().sum(dim=0).div_(num_samples - 1)
        product = _summed_product(centered).div_(num_samples - 1)
        sums = torch.stack([sum_of_squares(variance), variance.sum(dtype=torch.float64)])
        squares, total_variance = all_reduce_in_place(sums).unbind()
        total = sum_of_squares(product) - squares
        own = variance
        if debias:
            total = total - (total_variance.square() - squares) / (num_samples - 1)
            own = variance + (total_variance.to(variance) - variance) / (num_samples - 1)
        ctx.save_for_backward(x, product, own)
        ctx.num_dims = num_dims
        value: Tensor = total / num_dims
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_value: Float[Tensor, ""]) -> tuple[Tensor, None, None]:
        refuse_second_derivatives("covariance_of_dimension_shares")
        x, product, own = ctx.saved_tensors
        centered = x - x.mean(dim=0)
        gradient: Tensor = (product @ centered).addcmul_(centered, own.expand_as(centered), value=-1)
        return gradient.mul_(_slope(grad_value, x.shape[0], ctx.num_dims)), None, None


class _OfSampleShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "B D"], debias: bool) -> Float[Tensor, ""]:
        num_samples, num_dims = x.shape[0] * world_size(), x.shape[1]
        mean = all_reduce_in_place(x.sum(dim=0)).div_(num_samples)
        product = _summed_product((x - mean).t()).div_(num_samples - 1)
        variance = product.diagonal().clone()
        total = sum_of_squares(product.fill_diagonal_(0))
        if debias:
            total_variance = variance.sum(dtype=torch.float64)
            total = total - (total_variance.square() - sum_of_squares(variance)) / (num_samples - 1)
            # Of the gradient, beside the derivative of the variances: a diagonal that the product has room for.
            product.diagonal().copy_((variance - total_variance.to(variance)) / (num_samples - 1))
        ctx.save_for_backward(x, mean, product)
        value: Tensor = total / num_dims
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_value: Float[Tensor, ""]) -> tuple[Tensor, None]:
        refuse_second_derivatives("covariance_of_sample_shares")
        x, mean, product = ctx.saved_tensors
        gradient = (x - mean) @ product
        return gradient.mul_(_slope(grad_value, x.shape[0] * world_size(), x.shape[1])), None


def _slope(grad_value: Float[Tensor, ""], num_samples: int, num_dims: int) -> Float[Tensor, ""]:
    """Factor of the gradient, summed over processes that all use the value alike."""
    return grad_value * (4 * world_size() / (num_dims * (num_samples - 1)))


def _summed_product(a: Float[Tensor, "n k"], block: int = 256) -> Float[Tensor, "n n"]:
    """Product a a^T, summed over processes; of what mirrors itself nothing is computed or sent but blocks of rows."""
    num_rows = a.shape[0]
    starts = range(0, num_rows, block)
    widths = [min(start + block, num_rows) for start in starts]
    sizes = [(width - start) * width for start, width in zip(starts, widths, strict=True)]
    lower = a.new_empty(sum(sizes))
    parts = [part.view(-1, width) for part, width in zip(torch.split(lower, sizes), widths, strict=True)]
    for start, part in zip(starts, parts, strict=True):
        torch.mm(a[start : start + block], a[: start + block].t(), out=part)
    all_reduce_in_place(lower)
    product = a.new_empty(num_rows, num_rows)
    for start, part in zip(starts, parts, strict=True):
        rows = slice(start, start + block)
        product[rows, : start + block] = part
        product[:start, rows] = part[:, :start].t()
    return product
