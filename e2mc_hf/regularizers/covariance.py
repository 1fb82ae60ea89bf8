"""Off-diagonal covariance: how far the coordinates are from uncorrelated.

N samples, D coordinates, X the centered (N, D) sample, C = X^T X / (N-1) its covariance, K = X X^T its Gram matrix.

- feature form: 1/D * sum_{j != k} C_jk^2, which needs C, (D, D): 2 N D^2 operations.
- Gram form: the same number as 1/D * ( ||K||_F^2 / (N-1)^2 - sum_j C_jj^2 ), which needs K, (N, N): 2 N^2 D operations.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.differentiation import refuse_second_derivatives
from e2mc_hf.regularizers.precision import autocast_off, full_precision

Form = Literal["auto", "feature", "gram"]


def off_diagonal_covariance(x: Float[Tensor, "N D"], *, form: Form = "auto", debias: bool = False) -> Float[Tensor, ""]:
    """Sum of the squared off-diagonal covariances over D, with the n-1 denominator of the rows that are there.

    Args:
        x: Samples; N counts the whole batch over all processes.
        form: `feature` or `gram`, same value and gradient; `auto` takes the cheaper, Gram when N < D.
        debias: Subtract sum_{j != k} C_jj C_kk / (N-1), what independent coordinates score by chance in a finite
            sample: the expectation is then 0 for them (and a single value may be negative).

    Returns:
        Scalar in squared units of `x`^2; float32, or float64 for float64 samples.

    Raises:
        ValueError: If N < 2, or `form` is unknown.

    Reference:
        Bardes et al., VICReg, 2022, https://arxiv.org/abs/2105.04906, Eq. 4; Chakraborty et al., 2025,
        https://arxiv.org/abs/2411.15931, Algorithm 1. Differs from the authors' code in: N is counted, not configured,
        so that a smaller batch is not scaled down; a D x D matrix exists only when D <= N.
    """
    num_samples, num_dims = x.shape
    if num_samples < 2:
        raise ValueError(f"`x` must hold at least 2 samples, got {num_samples}. Pass a larger batch.")
    if form not in ("auto", "feature", "gram"):
        raise ValueError(f"`form` must be auto, feature or gram, got {form!r}. Leave it out for the cheaper one.")
    gram = form == "gram" or (form == "auto" and gram_is_cheaper(num_samples, num_dims))
    x = full_precision(x)
    with autocast_off(x):
        value: Tensor = _OffDiagonalCovariance.apply(x, gram, debias)
        return value


def gram_is_cheaper(num_samples: int, num_dims: int) -> bool:
    """Whether the Gram form takes less time than the feature form, on one process as on many: when N < D.

    W processes share the operations of either, 2 N^2 D / W and 2 N D^2 / W, and sum a product of N^2 or D^2 entries.
    """
    return num_samples < num_dims


class _OffDiagonalCovariance(torch.autograd.Function):
    """One product forward and one backward: autograd would spend two backward on a matrix that is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "N D"], gram: bool, debias: bool) -> Float[Tensor, ""]:
        num_samples, num_dims = x.shape
        centered = x - x.mean(dim=0)
        variance = centered.square().sum(dim=0).div_(num_samples - 1)
        if gram:
            product = _product_with_own_transpose(centered).div_(num_samples - 1)
            total = sum_of_squares(product) - sum_of_squares(variance)
        else:
            product = _product_with_own_transpose(centered.t()).div_(num_samples - 1).fill_diagonal_(0)
            total = sum_of_squares(product)
        if debias:
            chance = variance.double().sum().square() - sum_of_squares(variance)
            total = total - chance / (num_samples - 1)
        ctx.save_for_backward(x, product, variance)
        ctx.gram, ctx.debias = gram, debias
        return (total / num_dims).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_value: Float[Tensor, ""]) -> tuple[Tensor, None, None]:
        refuse_second_derivatives("off_diagonal_covariance")
        x, product, variance = ctx.saved_tensors
        num_samples, num_dims = x.shape
        centered = x - x.mean(dim=0)
        # Derivative over 4/(D (N-1)): X (C - diag C) in either form; the columns of it sum to 0 as those of X do.
        gradient = product @ centered if ctx.gram else centered @ product
        own = variance if ctx.gram else torch.zeros_like(variance)
        if ctx.debias:
            own = own + (variance.sum() - variance) / (num_samples - 1)
        gradient.addcmul_(centered, own.expand_as(centered), value=-1)
        return gradient.mul_(grad_value * (4 / (num_dims * (num_samples - 1)))), None, None


def _product_with_own_transpose(a: Float[Tensor, "n k"], block: int = 512) -> Float[Tensor, "n n"]:
    """Product a a^T with only the blocks on and below the diagonal computed; the rest is their mirror image."""
    product = a.new_empty(a.shape[0], a.shape[0])
    for start in range(0, a.shape[0], block):
        rows = slice(start, start + block)
        product[rows, : start + block] = a[rows] @ a[: start + block].t()
        product[:start, rows] = product[rows, :start].t()
    return product


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares in float64: the Gram form subtracts two of them."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()
