"""VICReg: two views agree, every dimension varies, no two dimensions repeat each other.

B samples on this process, N over all processes, D dimensions, z and z' the embeddings of the two views.

    invariance = mean over samples and dimensions of (z - z')^2
    variance   = mean over views, mean over dimensions of relu(1 - sqrt(Var(z_j) + eps))
    covariance = sum over views of 1/D * sum_{j != k} C_jk(z)^2
    loss       = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.objectives.heads import projector
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.regularizers.global_batch import global_batch
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class VICReg(Objective):
    """VICReg with its expander.

    Invariance is taken over the samples of this process, variance and covariance over those of all processes.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of every layer of the expander.
        projector_layers: Linear layers of the expander.
        invariance_weight: Weight of the mean squared distance of the views.
        variance_weight: Weight of the hinge on the standard deviations.
        covariance_weight: Weight of the off-diagonal covariance.
        eps: Added to a variance under the root.

    Reference:
        Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        ICLR 2022, https://arxiv.org/abs/2105.04906. As in the authors' code, the hinge is averaged over the two views
        and the covariance summed.
    """

    paper = (
        "Bardes, Ponce, LeCun, VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, "
        "ICLR 2022, https://arxiv.org/abs/2105.04906"
    )
    scale_matters = True

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 8192,
        projector_layers: int = 3,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        if projector_dim < 2 or projector_layers < 1:
            raise ValueError(
                "`projector_dim` must be at least 2 and `projector_layers` at least 1, "
                f"got {projector_dim} and {projector_layers}. The paper's are 8192 and 3."
            )
        self.projector = projector(feature_dim, projector_dim, num_layers=projector_layers)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.eps = eps

    def forward(self, features: Sequence[Float[Tensor, "B F"]], teacher_features: None = None) -> ObjectiveOutput:
        """Project the features of two views and score them.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: None.

        Returns:
            Loss, embeddings (2, B, D) and the terms `invariance`, `variance`, `covariance`.

        Raises:
            ValueError: If there are not exactly two views.
        """
        self.check_views(features)
        embeddings = torch.stack([self.projector(view) for view in features])
        return self.score(embeddings)

    def score(self, embeddings: Float[Tensor, "2 B D"]) -> ObjectiveOutput:
        """Score embeddings of this process; the loss runs in float32 under autocast, float64 stays float64."""
        z = full_precision(embeddings)
        with autocast_off(z):
            batch = global_batch(z)
            invariance = F.mse_loss(z[0], z[1])
            variance = batch.means_over_dims([self._hinges(view) for view in batch.views]).mean()
            covariance = batch.covariances(batch.covariance_views).sum()
            loss = (
                self.invariance_weight * invariance
                + self.variance_weight * variance
                + self.covariance_weight * covariance
            )
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return ObjectiveOutput(loss, embeddings, {name: term.detach() for name, term in terms.items()})

    def _hinges(self, view: Float[Tensor, "N d"]) -> Float[Tensor, " d"]:
        std = (view.var(dim=0) + self.eps).sqrt()
        return F.relu(1 - std)
