"""Barlow Twins: the cross-correlation of the embeddings of two views is the identity.

N samples over all processes, D dimensions, A and B the (N, D) embeddings of the two views, each dimension standardized
over the batch, C = A^T B / N their cross-correlation, (D, D).

    diagonal     = sum_i (1 - C_ii)^2
    off_diagonal = sum_{i != j} C_ij^2
    loss         = scale_loss * (diagonal + off_diagonal_weight * off_diagonal)

- feature form: C itself, 2 N D^2 operations.
- Gram form: ||C||_F^2 = sum_{n, m} (A A^T)_nm (B B^T)_nm / N^2, so that sum_{i != j} C_ij^2 = ||C||_F^2 - sum_i C_ii^2
  comes without a D x D matrix, 4 N^2 D operations.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import all_gather, all_reduce_sum, world_size
from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.regularizers.precision import autocast_off, full_precision

Form = Literal["auto", "feature", "gram"]


class BarlowTwins(Objective):
    """Barlow Twins with its projector.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of every layer of the projector.
        projector_layers: Linear layers of the projector.
        off_diagonal_weight: Weight of the off-diagonal correlations (the paper's lambda).
        scale_loss: Factor of the whole loss; 1 is the paper's Eq. 1. The authors trained with 0.024 and one learning
            rate of 0.2: under LARS, which adapts matrices but not vectors, that is the same as their two learning
            rates, 0.2 for matrices and 0.2 * 0.024 = 0.0048 for biases and normalizations.
        eps: Added to a variance under the root.

    Reference:
        Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML
        2021, https://arxiv.org/abs/2103.03230, Eq. 1 and 2. Differs from the authors' code in: embeddings are
        standardized by a function of the batch (biased variance, eps of a batch normalization) at training and
        evaluation alike, not by a batch normalization with running statistics.
    """

    paper = (
        "Zbontar, Jing, Misra, LeCun, Deny, Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML "
        "2021, https://arxiv.org/abs/2103.03230"
    )

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 8192,
        projector_layers: int = 3,
        *,
        off_diagonal_weight: float = 0.0051,
        scale_loss: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if projector_dim < 2 or projector_layers < 1:
            raise ValueError(
                "`projector_dim` must be at least 2 and `projector_layers` at least 1, "
                f"got {projector_dim} and {projector_layers}. The paper's are 8192 and 3."
            )
        if not off_diagonal_weight >= 0:
            raise ValueError(
                f"`off_diagonal_weight` must not be negative, got {off_diagonal_weight}. The paper's is 0.0051."
            )
        if not (scale_loss > 0 and eps > 0):
            raise ValueError(
                f"`scale_loss` and `eps` must be positive, got {scale_loss} and {eps}. Leave them out for 1 and 1e-5."
            )
        self.projector = mlp([feature_dim] + [projector_dim] * projector_layers, hidden_bias=False, last_bias=False)
        self.off_diagonal_weight = off_diagonal_weight
        self.scale_loss = scale_loss
        self.eps = eps

    def forward(self, features: Sequence[Float[Tensor, "B F"]], teacher_features: None = None) -> ObjectiveOutput:
        """Project the features of two views and score them.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: None.

        Returns:
            Loss, embeddings (2, B, D) before they are standardized, and the terms `barlow_diagonal` and
            `barlow_off_diagonal`.

        Raises:
            ValueError: If there are not exactly two views.
        """
        self.check_views(features)
        return self.score(torch.stack([self.projector(view) for view in features]))

    def score(self, embeddings: Float[Tensor, "2 B D"]) -> ObjectiveOutput:
        """Score embeddings of this process; the loss runs in float32 under autocast, float64 stays float64."""
        z = full_precision(embeddings)
        with autocast_off(z):
            diagonal, off_diagonal = correlation_terms(standardize(z, self.eps))
            loss = self.scale_loss * (diagonal + self.off_diagonal_weight * off_diagonal)
        terms = {"barlow_diagonal": diagonal, "barlow_off_diagonal": off_diagonal}
        return ObjectiveOutput(loss, embeddings, {name: term.detach() for name, term in terms.items()})


def standardize(z: Float[Tensor, "2 B D"], eps: float) -> Float[Tensor, "2 B D"]:
    """Give every dimension of every view mean 0 and variance 1 (1/N) over the samples of all processes.

    Args:
        z: Embeddings of this process.
        eps: Added to a variance under the root: a constant dimension becomes 0.
    """
    num_samples = z.shape[1] * world_size()
    centered = z - all_reduce_sum(z.sum(dim=1, keepdim=True)) / num_samples
    variance = all_reduce_sum(centered.square().sum(dim=1, keepdim=True)) / num_samples
    return centered * (variance + eps).rsqrt()


def correlation_terms(
    standardized: Float[Tensor, "2 B D"], *, form: Form = "auto"
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums of (1 - C_ii)^2 and, off the diagonal, of C_ij^2 for the cross-correlation C of all processes' samples.

    Args:
        standardized: Embeddings of this process, standardized over those of all.
        form: `feature` or `gram`, same value; `auto` takes the cheaper, Gram when 2 N < D. Its difference does not
            cancel there: with an even diagonal, ||C||_F^2 >= (sum_i C_ii)^2 / N > 2 sum_i C_ii^2, C being of rank N.

    Returns:
        Diagonal and off-diagonal sum.
    """
    a, b = standardized
    num_samples, num_dims = a.shape[0] * world_size(), a.shape[1]
    correlations = all_reduce_sum((a * b).sum(dim=0)) / num_samples
    diagonal = (1 - correlations).square().sum()
    if form == "gram" or (form == "auto" and 2 * num_samples < num_dims):
        every_a, every_b = all_gather(standardized, dim=1)
        total = all_reduce_sum(((a @ every_a.t()) * (b @ every_b.t())).sum()) / num_samples**2
        return diagonal, total - correlations.square().sum()
    cross = all_reduce_sum(a.t() @ b) / num_samples
    return diagonal, cross.fill_diagonal_(0).square().sum()
