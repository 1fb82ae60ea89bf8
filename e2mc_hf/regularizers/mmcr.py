"""MMCR: the centroids of the samples' views span the space evenly, and lie far out because the views agree.

V views, N samples over all processes, D dimensions, u the L2-normalized embeddings.

    c_i  = mean over views of u_i
    norm = sum of the singular values of C = (c_1 ... c_N)^T, (N, D)     up
    loss = -weight * norm
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.regularizer import Regularizer, check_weight
from e2mc_hf.regularizers.spectrum import SpectralFunction, spectral_sum
from e2mc_hf.regularizers.sphere import unit_rows

_ROOT = SpectralFunction(torch.sqrt, lambda s: s.rsqrt() / 2)


def nuclear_norm(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum of the singular values; the gradient is the polar factor U V^T, finite where they repeat or vanish.

    Returns:
        Scalar, unit of `x`. For N rows of length at most 1 it is at most sqrt(N min(N, D)).
    """
    return spectral_sum(x, _ROOT)


class MMCRRegularizer(Regularizer):
    """Nuclear norm of the centroids of the views, to be maximized.

    The term is `mmcr_nuclear_norm`; it enters the loss with a minus sign.

    Args:
        weight: lambda of the paper; 0.005 goes with the norm as it is, `normalize=False`.
        normalize: Divide by the largest value there is, sqrt(N min(N, D)), so that the term lies between 0 and 1 and
            a weight means the same in every batch size. The norm itself sums over samples where objectives average:
            the gradient of a sample is of order 1 up to N = D, not 1/N, so the useful weight depends on the batch.

    Raises:
        ValueError: If the weight is negative.

    Reference:
        Yerxa, Kuang, Simoncelli, Chung, "Learning Efficient Coding of Natural Images with Maximum Manifold Capacity
        Representations", NeurIPS 2023, https://arxiv.org/abs/2303.03307, the loss -||C||_*, as the alternative of
        Chakraborty et al., AISTATS 2025, https://arxiv.org/abs/2411.15931, Table 3: lambda = 0.005 on SwAV. Differs
        from the authors' code in: centroids of the large views that an objective exposes, where that table took all
        8 crops of SwAV; the gradient at a singular value of 0 is the subgradient of least norm.
    """

    paper = (
        "Yerxa, Kuang, Simoncelli, Chung, Learning Efficient Coding of Natural Images with Maximum Manifold Capacity "
        "Representations, NeurIPS 2023, https://arxiv.org/abs/2303.03307, the loss -||C||_*"
    )
    cost = "time N D min(N, D) + min(N, D)^3, memory N D + min(N, D)^2, in float64"

    def __init__(self, weight: float = 0.005, *, normalize: bool = False) -> None:
        check_weight("weight", weight)
        super().__init__({"mmcr_nuclear_norm": -weight})
        self.normalize = normalize

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Nuclear norm of the centroids."""
        norm = nuclear_norm(unit_rows(z).mean(dim=0))
        num_samples, num_dims = z.shape[1:]
        if self.normalize:
            norm = norm / math.sqrt(num_samples * min(num_samples, num_dims))
        return {"mmcr_nuclear_norm": norm}

    def extra_repr(self) -> str:
        """Weight and normalization, for `print(regularizer)`."""
        return f"{super().extra_repr()}, normalize={self.normalize}"
