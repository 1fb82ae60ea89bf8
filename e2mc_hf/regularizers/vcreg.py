"""VCReg: every dimension varies, no two repeat each other; VICReg without the invariance.

V views, N samples over all processes, D dimensions, t the standard deviation asked for.

    variance   = mean over views, mean over dimensions of relu(t - sqrt(Var(z_j) + t^2 eps))     down
    covariance = sum over views of 1/D * sum_{j != k} C_jk(z)^2                                  down
    loss       = variance_weight * variance + covariance_weight * covariance
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.regularizers.global_batch import SharedBatch, WholeBatch
from e2mc_hf.regularizers.regularizer import check_weight
from e2mc_hf.regularizers.shared_regularizer import SharedRegularizer
from e2mc_hf.regularizers.sphere import unit_rows

Space = Literal["embeddings", "hypersphere"]


def variance_hinge(x: Float[Tensor, "N D"], *, target: float = 1.0, eps: float = 1e-4) -> Float[Tensor, ""]:
    """Mean over the dimensions of what their standard deviation lacks to the target.

    Args:
        x: Samples; N counts the whole batch over all processes.
        target: Standard deviation asked for, unit of `x`.
        eps: Added to a variance under the root, in units of the squared target.

    Returns:
        Scalar between 0 and `target`, unit of `x`.

    Reference:
        Bardes et al., VICReg, 2022, https://arxiv.org/abs/2105.04906, Eq. 1-2. Differs from the authors' code in: eps
        scales with the target, so that the hinge of a rescaled sample is the rescaled hinge.
    """
    return hinges(x, target, eps).mean()


def hinges(x: Float[Tensor, "N D"], target: float, eps: float) -> Float[Tensor, " D"]:
    """What the standard deviation of each dimension lacks to the target; as `variance_hinge`."""
    std = (x.var(dim=0) + target**2 * eps).sqrt()
    return F.relu(target - std)


def check_space(space: str) -> None:
    """Check the name of a space.

    Raises:
        ValueError: If it is unknown.
    """
    if space not in ("embeddings", "hypersphere"):
        raise ValueError(f"`space` must be embeddings or hypersphere, got {space!r}. Pass one of the two.")


class VCRegRegularizer(SharedRegularizer):
    """Variance and covariance terms of VICReg on the embeddings, or on their directions.

    The terms are `vcreg_variance` and `vcreg_covariance`; one of weight 0 is computed for the log only.

    Args:
        variance_weight: mu of the paper.
        covariance_weight: nu of the paper.
        space: `embeddings` as they are, with standard deviation 1 asked for, or `hypersphere`, the L2-normalized
            embeddings with 1/sqrt(D), that of the uniform distribution there. The two need different weights: on the
            hypersphere the variance is smaller by sqrt(D) and the covariance by D^2.
        eps: Added to a variance under the root, in units of the squared target.

    Raises:
        ValueError: If a weight is negative, `eps` is not positive or `space` is unknown.

    Reference:
        Bardes, Ponce, LeCun, "VICReg", ICLR 2022, https://arxiv.org/abs/2105.04906, Eq. 1-4, as the alternative of
        Chakraborty et al., "Improving Pre-trained Self-Supervised Embeddings Through Effective Entropy Maximization",
        AISTATS 2025, https://arxiv.org/abs/2411.15931, Table 3: mu = 0.1 and nu = 0.001 on SwAV. That paper does not
        say in which of the two spaces, and its code offers both. As in VICReg's code, the variance is averaged over
        views and the covariance summed. Differs from the authors' code in: statistics of the whole batch over all
        processes; eps scales with the target, else it would be most of the variance on a hypersphere of many
        dimensions.
    """

    paper = (
        "Bardes, Ponce, LeCun, VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, "
        "ICLR 2022, https://arxiv.org/abs/2105.04906, Eq. 1-4"
    )
    cost = "time N D min(N, D), memory N D + min(N, D)^2"

    def __init__(
        self,
        variance_weight: float = 0.1,
        covariance_weight: float = 0.001,
        *,
        space: Space = "embeddings",
        eps: float = 1e-4,
    ) -> None:
        check_weight("variance_weight", variance_weight)
        check_weight("covariance_weight", covariance_weight)
        check_space(space)
        if not eps > 0:
            raise ValueError(f"`eps` must be positive, got {eps}. The paper's is 1e-4.")
        super().__init__({"vcreg_variance": variance_weight, "vcreg_covariance": covariance_weight})
        self.space: Space = space
        self.eps = eps

    def batch_terms(self, batch: WholeBatch | SharedBatch) -> dict[str, Tensor]:
        """Hinge on the standard deviations, and off-diagonal covariance."""
        on_sphere = self.space == "hypersphere"
        target = batch.num_dims**-0.5 if on_sphere else 1.0
        batch = batch.map_rows(unit_rows) if on_sphere else batch
        with self._gradient_of("vcreg_variance"):
            variance = batch.means_over_dims([hinges(view, target, self.eps) for view in batch.views]).mean()
        with self._gradient_of("vcreg_covariance"):
            covariance = batch.covariances(batch.covariance_views).sum()
        return {"vcreg_variance": variance, "vcreg_covariance": covariance}

    def _gradient_of(self, term: str) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[term] > 0)

    def extra_repr(self) -> str:
        """Weights and space, for `print(regularizer)`."""
        return f"{super().extra_repr()}, space={self.space!r}"
