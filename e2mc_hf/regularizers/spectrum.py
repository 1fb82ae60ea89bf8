"""Functions of the singular values of a matrix, and the rows of unit length that such criteria are taken of.

X (n, d), s_k the eigenvalues of X X^T, which are those of X^T X and the squares of the singular values of X.

    F(X) = sum_k f(s_k)        dF/dX = 2 f'(X X^T) X = 2 X f'(X^T X)

The gradient is written in this form because the derivative of eigenvectors divides by the differences of eigenvalues:
it is infinite where two of them agree, although F is smooth there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.differentiation import refuse_second_derivatives


class SpectralFunction(NamedTuple):
    """A function f of an eigenvalue s > 0 with f(0) = 0, and its derivative f'; both entry by entry."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def spectral_sum(x: Float[Tensor, "n d"], function: SpectralFunction) -> Float[Tensor, ""]:
    """Sum a function over the eigenvalues of the smaller of X X^T and X^T X, in float64 inside.

    Eigenvalues below max(n, d) * 2e-16 of the largest are rounding and count as 0, without gradient: for singular
    values that is about 1e-6 of the largest, or less. Where the function has a kink at 0, as the root, this is the
    subgradient of least norm.

    Args:
        x: Matrix.
        function: f and f'.

    Returns:
        Scalar of the dtype of `x`; NaN when an entry is not finite.
    """
    value: Tensor = _SpectralSum.apply(x, function)
    return value


class _SpectralSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "n d"], function: SpectralFunction) -> Float[Tensor, ""]:
        # A product squares the singular values: float32 would lose all below 3e-4 of the largest.
        wide = (x if x.shape[0] <= x.shape[1] else x.t()).double()
        eigenvalues, vectors = _eigen_decomposition(wide @ wide.t())
        cut = torch.finfo(torch.float64).eps * max(x.shape) * eigenvalues[-1]
        vanishes = eigenvalues <= cut
        eigenvalues = torch.where(vanishes, 1.0, eigenvalues)
        value = torch.where(vanishes, 0.0, function.value(eigenvalues)).sum()
        if ctx.needs_input_grad[0]:
            slope = torch.where(vanishes, 0.0, function.derivative(eigenvalues))
            ctx.save_for_backward(x, (vectors * slope) @ vectors.t())
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_value: Float[Tensor, ""]) -> tuple[Tensor, None]:
        refuse_second_derivatives("spectral_sum")
        x, slope = ctx.saved_tensors
        exact = x.double()
        gradient = slope @ exact if x.shape[0] <= x.shape[1] else exact @ slope
        return gradient.mul_(2 * grad_value.double()).to(x.dtype), None


def _eigen_decomposition(
    symmetric: Float[Tensor, "r r"],
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r r"]]:
    """Eigenvalues in ascending order and eigenvectors; NaN for a matrix that is not finite, which LAPACK refuses."""
    if symmetric.isfinite().all():
        eigenvalues, vectors = torch.linalg.eigh(symmetric)
        return eigenvalues, vectors
    nothing = torch.full_like(symmetric, torch.nan)
    return nothing[0], nothing
