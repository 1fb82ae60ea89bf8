"""VNE: the eigenvalues of the embeddings' autocorrelation are even.

V views, N samples over all processes, D dimensions, Z (N, D) the L2-normalized embeddings of one view.

    lambda_k = eigenvalues of Z^T Z / N; they sum to 1
    entropy  = mean over views of -sum_k lambda_k log(lambda_k)     up
    loss     = -weight * entropy
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.regularizer import Regularizer, check_weight
from e2mc_hf.regularizers.spectrum import SpectralFunction, spectral_sum
from e2mc_hf.regularizers.sphere import unit_rows

_ENTROPY = SpectralFunction(lambda s: -s * s.log(), lambda s: -(s.log() + 1))


def von_neumann_entropy(x: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Entropy of the eigenvalues of X^T X / N, nats.

    For rows of unit length between 0, when all point along one line, and log min(N, D); its exponential is an
    effective number of dimensions.
    """
    return spectral_sum(x / math.sqrt(x.shape[0]), _ENTROPY)


class VNERegularizer(Regularizer):
    """Von Neumann entropy of the autocorrelation of the L2-normalized embeddings, to be maximized (VNE+).

    The term is `vne_entropy` (nats); it enters the loss with a minus sign. The gradient is 0 when all embeddings
    agree: it keeps them from one line, and cannot part them.

    Args:
        weight: alpha_2 of I-VNE+; 1, where the cosine similarity of the views has 4.16, in the authors' code for
            ImageNet-100. Beside an objective of another scale it is to be chosen anew.

    Raises:
        ValueError: If the weight is negative.

    Reference:
        Kim, Kang, Hwang, Shin, Rhee, "VNE: An Effective Method for Improving Deep Representation by Manipulating
        Eigenvalue Distribution", CVPR 2023, https://arxiv.org/abs/2304.01434, S(C_auto) of the loss of I-VNE+; the
        mean over views as in the authors' code. Differs from the authors' code in: the autocorrelation is that of the
        whole batch over all processes; eigenvalues of the smaller of Z^T Z and Z Z^T, not singular values, with a
        gradient that is finite where they repeat or vanish.
    """

    paper = (
        "Kim, Kang, Hwang, Shin, Rhee, VNE: An Effective Method for Improving Deep Representation by Manipulating "
        "Eigenvalue Distribution, CVPR 2023, https://arxiv.org/abs/2304.01434, S(C_auto) of I-VNE+"
    )
    cost = "time N D min(N, D) + min(N, D)^3, memory N D + min(N, D)^2, in float64"

    def __init__(self, weight: float = 1.0) -> None:
        check_weight("weight", weight)
        super().__init__({"vne_entropy": -weight})

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Von Neumann entropy, averaged over views."""
        return {"vne_entropy": torch.stack([von_neumann_entropy(u) for u in unit_rows(z)]).mean()}
