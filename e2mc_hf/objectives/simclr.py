"""SimCLR: of all views in the batch, a view finds the other view of its image.

N images over all processes, 2N views, u the embeddings of the views divided by their norm, t the temperature.

    loss of the anchor i with its positive p(i) = -log( exp(u_i . u_p(i) / t) / sum_{k != i} exp(u_i . u_k / t) )
    loss = mean over the 2N anchors
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.distributed import all_gather, rank
from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class SimCLR(Objective):
    """SimCLR with its projection head and the NT-Xent loss.

    A process scores its own 2B views as anchors against the 2N views of all processes: 4 B N D operations each, and a
    matrix of 2B x 2N logits.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of the embeddings.
        hidden_dim: Width of the hidden layers of the projection head.
        projector_layers: Linear layers of the projection head.
        temperature: t, what cosines are divided by. 0.1 is the paper's on ImageNet at a batch of 4096 for 100 epochs
            (Table 5). On CIFAR-10 trained for more than 300 epochs the paper finds 0.5 the best of 0.1, 0.5 and 1.0 at
            every batch size (Fig. B.8), with 0.1 gaining as batches grow.

    Reference:
        Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
        ICML 2020, https://arxiv.org/abs/2002.05709, Eq. 1 and Algorithm 1. Differs from the authors' code in: the loss
        is Algorithm 1's mean over 2N anchors, half of the code's, which sums the means over the two views; the last
        layer of the head is not followed by batch normalization, so that a regularizer sees the scale of the
        embeddings; hidden layers are `hidden_dim` wide, there as wide as the features (2048 for a ResNet-50). As there,
        a norm counts as 1e-6 at least, and both views pass a batch normalization as one batch.
    """

    paper = (
        "Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual Representations, "
        "ICML 2020, https://arxiv.org/abs/2002.05709"
    )
    joint_batch_statistics = True

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 128,
        hidden_dim: int = 2048,
        projector_layers: int = 2,
        *,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if min(projector_dim, hidden_dim, projector_layers) < 1:
            raise ValueError(
                "`projector_dim`, `hidden_dim` and `projector_layers` must be at least 1, "
                f"got {projector_dim}, {hidden_dim} and {projector_layers}. The paper's are 128, 2048 and 2."
            )
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}. The paper's is 0.1.")
        widths = [feature_dim] + [hidden_dim] * (projector_layers - 1) + [projector_dim]
        self.projector = mlp(widths, hidden_bias=False, last_bias=False)
        self.temperature = temperature

    def forward(self, features: Sequence[Float[Tensor, "B F"]], teacher_features: None = None) -> ObjectiveOutput:
        """Project the features of two views as one batch and score them.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: None.

        Returns:
            Loss, embeddings (2, B, D) before they are divided by their norm, and the terms `contrastive` and
            `contrastive_accuracy`, the share of anchors to which their positive is the nearest view.

        Raises:
            ValueError: If there are not exactly two views.
        """
        self.check_views(features)
        return self.score(self.projector(torch.cat(list(features))).unflatten(0, (2, -1)))

    def score(self, embeddings: Float[Tensor, "2 B D"]) -> ObjectiveOutput:
        """Score embeddings of this process; the loss runs in float32 under autocast, float64 stays float64."""
        z = full_precision(embeddings)
        with autocast_off(z):
            own = F.normalize(z, dim=-1, eps=1e-6)
            logits, positives = contrast(own, all_gather(own, dim=1), self.temperature)
            contrastive = F.cross_entropy(logits, positives)
        accuracy = (logits.detach().argmax(dim=1) == positives).to(logits.dtype).mean()
        terms = {"contrastive": contrastive.detach(), "contrastive_accuracy": accuracy}
        return ObjectiveOutput(contrastive, embeddings, terms)


def contrast(
    own: Float[Tensor, "2 B D"], everyone: Float[Tensor, "2 N D"], temperature: float
) -> tuple[Float[Tensor, "2*B 2*N"], Tensor]:
    """Logits of the views of this process against all views, and which of these is the positive.

    Args:
        own: Unit embeddings of this process.
        everyone: Those of all processes, in rank order.
        temperature: What cosines are divided by.

    Returns:
        Logits, minus infinity where an anchor meets itself, and the column of the positive of each anchor, (2B,).
    """
    num_own, num_samples = own.shape[1], everyone.shape[1]
    logits = (own.flatten(0, 1) / temperature) @ everyone.flatten(0, 1).t()
    samples = torch.arange(num_own, device=own.device) + rank() * num_own
    anchors = torch.cat([samples, samples + num_samples])
    logits[torch.arange(2 * num_own, device=own.device), anchors] = -torch.inf
    return logits, anchors.roll(num_own)
