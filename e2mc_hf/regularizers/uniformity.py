"""Uniformity: embeddings repel each other on the hypersphere, as by a Gaussian potential.

V views, N samples over all processes, D dimensions, u_i the L2-normalized embeddings of one view.

    uniformity = mean over views of log( 2/(N(N-1)) * sum_{i < j} exp(-t |u_i - u_j|^2) )     down
    loss       = weight * uniformity
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.differentiation import refuse_second_derivatives
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight
from e2mc_hf.regularizers.sphere import unit_rows


def log_mean_potential(u: Float[Tensor, "N D"], temperature: float = 2.0) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential exp(-t |u_i - u_j|^2) over the pairs i < j.

    All squared distances come from one product, |u_i|^2 + |u_j|^2 - 2 u_i.u_j, and the gradient from one more.

    Args:
        u: Samples; N >= 2 counts the whole batch over all processes.
        temperature: t, over the squared unit of `u`.

    Returns:
        Scalar, at most 0, its value when all samples agree. On the unit sphere at least -2 t N/(N-1), reached when
        they are the corners of a regular simplex.

    Reference:
        Wang, Isola, 2020, https://arxiv.org/abs/2005.10242, the uniformity loss of Section 4.1. Differs from the
        authors' code in: one product of matrices and a log-sum-exp, where theirs computes each distance by itself.
    """
    value: Tensor = _LogMeanPotential.apply(u, temperature)
    return value


class _LogMeanPotential(torch.autograd.Function):
    """Gradient 4 t (W u - diag(W 1) u), W the share of each pair in the sum: one product, as W is symmetric."""

    @staticmethod
    def forward(ctx: Any, u: Float[Tensor, "N D"], temperature: float) -> Float[Tensor, ""]:
        num_samples = u.shape[0]
        squares = u.square().sum(dim=1)
        exponents = (u @ u.t()).mul_(2).sub_(squares).sub_(squares[:, None]).mul_(temperature)
        exponents.clamp_(max=0).fill_diagonal_(-torch.inf)
        total = exponents.flatten().logsumexp(dim=0)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(u, exponents.sub_(total).exp_())
            ctx.temperature = temperature
        return total - math.log(num_samples * (num_samples - 1))

    @staticmethod
    def backward(ctx: Any, grad_value: Float[Tensor, ""]) -> tuple[Tensor, None]:
        refuse_second_derivatives("log_mean_potential")
        u, shares = ctx.saved_tensors
        gradient = (shares @ u).addcmul_(shares.sum(dim=1, keepdim=True), u, value=-1)
        return gradient.mul_(grad_value * (4 * ctx.temperature)), None


class UniformityRegularizer(Regularizer):
    """Logarithm of the mean Gaussian potential of the L2-normalized embeddings.

    The term is `uniformity`, the mean over views. The gradient is 0 when all embeddings agree: it keeps them apart,
    and cannot part them.

    Args:
        weight: lambda of the paper.
        temperature: t of the potential.

    Raises:
        ValueError: If the weight is negative or the temperature not positive.

    Reference:
        Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, https://arxiv.org/abs/2005.10242, the uniformity loss of Section 4.1, as the
        alternative AUH of Chakraborty et al., AISTATS 2025, https://arxiv.org/abs/2411.15931, Table 3: lambda = 0.5
        and t = 2 on SwAV. Averaged over views as in the code of that paper; its text sums, which is twice the weight
        for two views.
    """

    paper = (
        "Wang, Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the "
        "Hypersphere, ICML 2020, https://arxiv.org/abs/2005.10242, uniformity loss of Section 4.1"
    )
    cost = "time N^2 D, memory N D + N^2"

    def __init__(self, weight: float = 0.5, *, temperature: float = 2.0) -> None:
        check_weight("weight", weight)
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, got {temperature}. The paper's t is 2.")
        super().__init__({"uniformity": weight})
        self.temperature = temperature

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Log mean potential, averaged over views."""
        return {"uniformity": torch.stack([log_mean_potential(u, self.temperature) for u in unit_rows(z)]).mean()}

    def extra_repr(self) -> str:
        """Weight and temperature, for `print(regularizer)`."""
        return f"{super().extra_repr()}, temperature={self.temperature}"
