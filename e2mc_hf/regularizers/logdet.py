"""Log-determinant of the covariance: the entropy of the Gaussian with the embeddings' covariance, up to a constant.

V views, N samples over all processes, D dimensions, X the centered (N, D) sample of one view, r = min(N, D).

    log determinant = mean over views of 1/D * log det(X^T X / (N-1) + eps I)        up
                    = log eps + 1/D * log det(I_r + X X^T / ((N-1) eps))             (Sylvester: N x N when N < D)
    loss            = -weight * log determinant
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.coding_length import log_det
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight


class LogDetRegularizer(Regularizer):
    """Log-determinant of each view's covariance, in nats a dimension.

    `logdet_covariance` grows without bound with the scale of the embeddings. It is meant for objectives that hold the
    scale: by batch normalization (SimSiam, MEC) or a distance of the views (VICReg). Where only directions count (SwAV,
    SimCLR), the regularizer `mec` does the same for directions.

    Args:
        weight: Weight of the log-determinant. The choice of 1 is this project's: CorInfoMax weighs it against its own
            distance of the views.
        eps: Added to every variance, in squared units of the embeddings: directions with less count as empty. 1e-3 is
            for embeddings of variance 1 or so.

    Raises:
        ValueError: If the weight is negative or `eps` not positive.

    Reference:
        Ozsoy, Hamdan, Arik, Yuret, Erdogan, "Self-Supervised Learning with an Information Maximization Criterion"
        (CorInfoMax), NeurIPS 2022, https://arxiv.org/abs/2209.07999, the log-determinant of its objective; Wu et al.,
        "Simplifying DINO via Coding Rate Regularization", ICML 2025, https://arxiv.org/abs/2502.10385. Differs from
        CorInfoMax's code in: the covariance of the batch, not a running average that starts at the identity, hence an
        eps of 1e-3, not 1e-8; the mean, not the sum, over views; N - 1, not N; an r x r Cholesky factor.
    """

    paper = (
        "Ozsoy, Hamdan, Arik, Yuret, Erdogan, Self-Supervised Learning with an Information Maximization Criterion, "
        "NeurIPS 2022, https://arxiv.org/abs/2209.07999, log-determinant of the objective"
    )
    cost = "N D r + r^3 time in float64, N D + r^2 memory, r = min(N, D)"

    def __init__(self, weight: float = 1.0, *, eps: float = 1e-3) -> None:
        check_weight("weight", weight)
        if not eps > 0:
            raise ValueError(f"`eps` must be positive, got {eps}. Leave it out for 1e-3.")
        super().__init__({"logdet_covariance": -weight})
        self.eps = eps

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Compute the log-determinant a dimension."""
        wide = z.double()
        centered = wide - wide.mean(dim=1, keepdim=True)
        lam = 1 / ((z.shape[1] - 1) * self.eps)
        lengths = torch.stack([log_det(view, lam) for view in centered])
        return {"logdet_covariance": (math.log(self.eps) + lengths.mean() / z.shape[2]).to(z.dtype)}
