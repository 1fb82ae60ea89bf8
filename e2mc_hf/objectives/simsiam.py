"""SimSiam: from one view, predict the embedding of the other, which gets no gradient.

p the predictions and z the embeddings of the two views, sg the stop-gradient, cos the mean over samples.

    loss = -1/2 * (cos(p_1, sg z_2) + cos(p_2, sg z_1))
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.regularizers.precision import autocast_off, full_precision
from e2mc_hf.regularizers.sphere import unit_rows


class SimSiam(Objective):
    """SimSiam with its projector and predictor.

    The embeddings handed to the regularizer, both of them, carry gradient; only the loss detaches them. A row of length
    0 has no direction: its cosine is 0, without gradient.

    The authors' files hold a frozen bias of the projector's last layer (`encoder.fc.6.bias`), which the normalization
    after it cancels. Here it is left out: an importer subtracts it from that normalization's running mean.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of every layer of the projector and of the predictions.
        predictor_dim: Width of the predictor's hidden layer.
        predictor_learning_rate: Learning rate of the predictor, exempt from the schedule; that of the run when not
            given. The authors hold it at 0.05 * batch size / 256, 0.1 for 512.

    Raises:
        ValueError: If an option is out of range.

    Reference:
        Chen, He, "Exploring Simple Siamese Representation Learning", CVPR 2021, https://arxiv.org/abs/2011.10566,
        Algorithm 1. Differs from the authors' code in: hidden layers of the projector are `projector_dim` wide, as the
        paper says, not as wide as the features (the same for a ResNet-50).
    """

    paper = "Chen, He, Exploring Simple Siamese Representation Learning, CVPR 2021, https://arxiv.org/abs/2011.10566"

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 2048,
        predictor_dim: int = 512,
        *,
        predictor_learning_rate: float | None = None,
    ) -> None:
        super().__init__()
        if min(projector_dim, predictor_dim) < 1:
            raise ValueError(
                "`projector_dim` and `predictor_dim` must be at least 1, "
                f"got {projector_dim} and {predictor_dim}. The paper's are 2048 and 512."
            )
        if predictor_learning_rate is not None and not predictor_learning_rate > 0:
            raise ValueError(
                f"`predictor_learning_rate` must be positive, got {predictor_learning_rate}. "
                "Leave it out for the learning rate of the run."
            )
        widths = [feature_dim, projector_dim, projector_dim, projector_dim]
        self.projector = mlp(widths, hidden_bias=False, last_bias=False, last_norm=True, last_norm_affine=False)
        self.predictor = mlp([projector_dim, predictor_dim, projector_dim], hidden_bias=False)
        self.predictor_learning_rate = predictor_learning_rate

    def fixed_learning_rates(self) -> dict[str, float]:
        """The predictor's learning rate, where one is given."""
        return {} if self.predictor_learning_rate is None else {"predictor": self.predictor_learning_rate}

    def forward(self, features: Sequence[Float[Tensor, "B F"]], teacher_features: None = None) -> ObjectiveOutput:
        """Project and predict the features of two views and score them.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: None.

        Returns:
            Loss, embeddings (2, B, D) with gradient, and the term `cosine`.

        Raises:
            ValueError: If there are not exactly two views.
        """
        self.check_views(features)
        embeddings = torch.stack([self.projector(view) for view in features])
        predictions = torch.stack([self.predictor(view) for view in embeddings])
        loss = self.score(predictions, embeddings)
        return ObjectiveOutput(loss, embeddings, {"cosine": -loss.detach()})

    def score(self, predictions: Float[Tensor, "2 B D"], embeddings: Float[Tensor, "2 B D"]) -> Float[Tensor, ""]:
        """Negative mean cosine of each view's predictions with the other view's embeddings, which get no gradient.

        Args:
            predictions: Those of the views on this process.
            embeddings: What they predict, in the same order of the views.

        Returns:
            Scalar in [-1, 1]; float32 under autocast, float64 stays float64.
        """
        p, z = full_precision(predictions), full_precision(embeddings.detach())
        with autocast_off(p):
            return -(unit_rows(p) * unit_rows(z).flip(0)).sum(dim=-1).mean()
