"""SIGReg: every one-dimensional projection of the embeddings distributed as a standard normal.

V views, N samples over all processes, D dimensions, K unit directions a, x_n = a^T z_n, P knots t on [-5, 5].

    c(t) + i s(t) = mean over samples of exp(i t x_n)                          empirical characteristic function
    T             = N * integral of ((c - phi)^2 + s^2) w dt                   Epps-Pulley, phi = w = exp(-t^2/2)
    loss          = weight * mean over views and directions of T

The integral is the trapezoidal rule on equally spaced knots, w part of the integrand. The integrand is even and 0 at
t = 0, so that only the (P-1)/2 knots above 0 are computed.
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.differentiation import refuse_second_derivatives
from e2mc_hf.regularizers.directions import check_directions, random_directions
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight

_LARGEST_KNOT = 5.0
# Projections in one block: small enough to stay in a CPU's cache, large enough to keep a GPU busy.
_BLOCK_ENTRIES = {"cpu": 2**16, "cuda": 2**25}


class SIGRegRegularizer(Regularizer):
    """Sketched isotropic Gaussian regularization: Epps-Pulley statistics of random projections.

    The term is `sigreg`. Samples of a standard normal score sqrt(2 pi) (1 - 1/sqrt(3)) = 1.06 on average, whatever N;
    a sample at the normal quantiles scores nearly 0. Of embeddings near collapse the gradient vanishes, and a
    projection of size x looks to the knots like x +- 10.05 (their spacing is 0.625).

    Args:
        weight: lambda of the paper.
        num_directions: K, drawn anew at each step, on the CPU: 12 ms for K = 1024, D = 2048.
        num_knots: P, odd.
        seed: Of the directions, which are the same on every process and after a resume.

    Raises:
        ValueError: If an option is out of range.

    Reference:
        Balestriero, LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025,
        https://arxiv.org/abs/2511.08544, Algorithm 1. Differs from the authors' code in: half the knots, the
        quadrature's value being the same; sines and cosines of the knots by repeated rotation; the gradient is
        computed with the value, so that memory does not grow with P.
    """

    paper: ClassVar[str] = (
        "Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics, 2025, "
        "https://arxiv.org/abs/2511.08544, Algorithm 1"
    )
    cost: ClassVar[str] = "K directions, P knots: time N D K + N K P, memory N K + D K"

    def __init__(self, weight: float = 0.05, *, num_directions: int = 1024, num_knots: int = 17, seed: int = 0) -> None:
        check_weight("weight", weight)
        super().__init__({"sigreg": weight})
        check_directions(num_directions, seed)
        if num_knots < 3 or num_knots % 2 == 0:
            raise ValueError(f"`num_knots` must be odd and at least 3, got {num_knots}. The paper's is 17.")
        self.num_directions = num_directions
        self.num_knots = num_knots
        self.seed = seed

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Mean statistic over directions and views."""
        directions = random_directions(z.shape[2], self.num_directions, self.seed, self.step, z)
        statistics = [epps_pulley(directions @ view.t(), self.num_knots) for view in z]
        return {"sigreg": torch.stack(statistics).mean()}


def epps_pulley(x: Float[Tensor, "K N"], num_knots: int = 17) -> Float[Tensor, " K"]:
    """Epps-Pulley statistic of each row against the standard normal, by the trapezoidal rule on [-5, 5].

    Args:
        x: Samples, one distribution a row.
        num_knots: P, odd: so many knots from -5 to 5, both included.

    Returns:
        N times the weighted squared distance of the characteristic functions, (K,).
    """
    statistic: Tensor = _EppsPulley.apply(x, num_knots)
    return statistic


class _EppsPulley(torch.autograd.Function):
    """Statistic whose gradient is written down while sines and cosines are at hand: autograd would keep them all."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "K N"], num_knots: int) -> Float[Tensor, " K"]:
        statistic = x.new_zeros(x.shape[0])
        gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        rows = max(1, _BLOCK_ENTRIES.get(x.device.type, 2**25) // x.shape[1])
        for start in range(0, x.shape[0], rows):
            block = slice(start, start + rows)
            statistic[block] = _block_statistic(x[block], num_knots, None if gradient is None else gradient[block])
        ctx.save_for_backward(gradient)
        return statistic

    @staticmethod
    def backward(ctx: Any, grad_statistic: Float[Tensor, " K"]) -> tuple[Tensor, None]:
        refuse_second_derivatives("epps_pulley")
        (gradient,) = ctx.saved_tensors
        return gradient * grad_statistic[:, None], None


def _block_statistic(
    x: Float[Tensor, "k N"], num_knots: int, gradient: Float[Tensor, "k N"] | None
) -> Float[Tensor, " k"]:
    """Statistic of each row; adds its gradient to `gradient`."""
    num_positive = num_knots // 2
    spacing = _LARGEST_KNOT / num_positive
    cos_step, sin_step = torch.cos(spacing * x), torch.sin(spacing * x)
    cos, sin = cos_step, sin_step
    statistic = x.new_zeros(x.shape[0])
    for knot in range(1, num_positive + 1):
        t = knot * spacing
        phi = math.exp(-(t**2) / 2)
        # A knot stands for itself and for its mirror image; the trapezoidal rule halves the two at the ends.
        weight = phi * spacing * (1 if knot == num_positive else 2)
        real, imaginary = cos.mean(dim=1) - phi, sin.mean(dim=1)
        statistic += x.shape[1] * weight * (real.square() + imaginary.square())
        if gradient is not None:
            gradient.addcmul_(cos, imaginary[:, None], value=2 * weight * t)
            gradient.addcmul_(sin, real[:, None], value=-2 * weight * t)
        if knot < num_positive:
            cos, sin = cos * cos_step - sin * sin_step, sin * cos_step + cos * sin_step
    return statistic
