"""Sinkhorn-Knopp: share the samples of all processes equally among the prototypes.

N samples over all processes, K prototypes. The plan Q is the matrix of the form diag(r) exp(scores / temperature)
diag(c) whose rows sum to 1/N and columns to 1/K.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import all_gather
from e2mc_hf.regularizers.precision import autocast_off, full_precision


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "B K"], temperature: float, num_iterations: int = 3) -> Float[Tensor, "B K"]:
    """Codes of samples: soft assignments to prototypes, such that all prototypes are used equally.

    Each iteration gives every prototype the mass 1/K, then every sample the mass 1/N. In the logarithm, where the
    largest score is subtracted before every exponential: nothing overflows, and no prototype can be left without mass.

    Args:
        scores: Similarity of the samples of this process to each prototype; as many samples on every process.
        temperature: Weight of the entropy of the plan (epsilon of the paper).
        num_iterations: How often to normalize prototypes and samples; few leave the prototypes nearly equal.

    Returns:
        N times the rows of the plan that belong to this process: each sums to 1. Without gradient; in float32 under
        autocast, float64 stays float64.

    Reference:
        Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013,
        https://arxiv.org/abs/1306.0895, Algorithm 1; Caron et al., "Unsupervised Learning of Visual Features by
        Contrasting Cluster Assignments", NeurIPS 2020, https://arxiv.org/abs/2006.09882, Eq. 3-5. Differs from the
        authors' code in: logarithms, since theirs overflows float32 where a score exceeds 88 temperatures.
    """
    scores = full_precision(scores)
    with autocast_off(scores):
        log_plan = scores / temperature
        for _ in range(num_iterations):
            log_plan -= _log_mass_of_prototypes(log_plan)
            log_plan -= log_plan.logsumexp(dim=1, keepdim=True)
        # The exponential of log_plan, with the rounding of large scores normalized away.
        return log_plan.softmax(dim=1)


def _log_mass_of_prototypes(log_plan: Float[Tensor, "B K"]) -> Float[Tensor, "1 K"]:
    own = log_plan.logsumexp(dim=0, keepdim=True)
    return all_gather(own).logsumexp(dim=0, keepdim=True)
