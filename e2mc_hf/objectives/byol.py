"""BYOL: from one view, predict what a slowly moving teacher makes of the other.

q the student's prediction from one view, z' the teacher's projection of the other, both divided by their norm.

    distance = mean over samples of ||q - z'||^2 = 2 - 2 mean cos(q, z')
    loss     = distance(prediction of view 1, target of view 2) + distance(prediction of view 2, target of view 1)
    teacher  = m * teacher + (1 - m) * student after every step, m on half a cosine from `momentum` to 1 over the run
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.teacher import TeacherBuffers, check_teacher_options, freeze
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class BYOL(Objective):
    """BYOL with its projector, predictor and the teacher's projector.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of embeddings, predictions and targets.
        hidden_dim: Width of the hidden layer of projector and predictor.
        momentum: Share of the old teacher in the new one at the first step; it ends at 1.
        teacher_buffers: What becomes of the teacher's running statistics: `own` leaves those it gathers itself,
            `average` treats them like parameters, `copy` takes the student's.

    Reference:
        Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020,
        https://arxiv.org/abs/2006.07733, Eq. 1 and 2 and Section 3.2. Differs from the authors' code in: the teacher
        starts as a copy of the student, not with weights of its own; the momentum is 1 at the last step k = K - 1, not
        at k = K. As there, the last layer of a head has no bias, and a norm counts as 1e-6 at least.
    """

    paper = (
        "Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS 2020, "
        "https://arxiv.org/abs/2006.07733"
    )
    has_teacher = True

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 256,
        hidden_dim: int = 4096,
        *,
        momentum: float = 0.996,
        teacher_buffers: TeacherBuffers = "own",
    ) -> None:
        super().__init__()
        if min(projector_dim, hidden_dim) < 1:
            raise ValueError(
                "`projector_dim` and `hidden_dim` must be at least 1, "
                f"got {projector_dim} and {hidden_dim}. The paper's are 256 and 4096."
            )
        check_teacher_options(momentum, teacher_buffers)
        self.projector = mlp([feature_dim, hidden_dim, projector_dim], last_bias=False)
        self.predictor = mlp([projector_dim, hidden_dim, projector_dim], last_bias=False)
        self.teacher_projector = freeze(deepcopy(self.projector))
        self.momentum = momentum
        self.teacher_buffers = teacher_buffers

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Projector of the student with the teacher's."""
        return [(self.projector, self.teacher_projector)]

    def forward(
        self,
        features: Sequence[Float[Tensor, "B F"]],
        teacher_features: Sequence[Float[Tensor, "B F"]] | None = None,
    ) -> ObjectiveOutput:
        """Project and predict the features of two views, and compare with what the teacher projects.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: Those of the teacher's backbone.

        Returns:
            Loss, the student's embeddings (2, B, D) before they are divided by their norm, and the term
            `prediction_distance`, its sum over the two directions.

        Raises:
            ValueError: If there are not exactly two views, or none of the teacher's.
        """
        self.check_views(features)
        if teacher_features is None or len(teacher_features) != len(features):
            got = "none" if teacher_features is None else len(teacher_features)
            raise ValueError(f"`teacher_features` must hold both views for byol, got {got}. Pass the teacher's.")
        embeddings = torch.stack([self.projector(view) for view in features])
        predictions = torch.stack([self.predictor(view) for view in embeddings])
        with torch.no_grad():
            targets = torch.stack([self.teacher_projector(view) for view in teacher_features])
        loss = prediction_distance(predictions, targets)
        return ObjectiveOutput(loss, embeddings, {"prediction_distance": loss.detach()})


def prediction_distance(predictions: Float[Tensor, "2 B D"], targets: Float[Tensor, "2 B D"]) -> Float[Tensor, ""]:
    """Sum over the two directions of the mean squared distance of unit predictions to the other view's unit targets.

    Written as a distance and not as 2 - 2 cos, which cancels where prediction and target nearly agree.

    Args:
        predictions: The student's predictions from each view.
        targets: The teacher's projections of each view.

    Returns:
        Scalar from 0 (parallel) to 8 (opposite); float32, or float64 for float64 predictions.
    """
    predictions, targets = full_precision(predictions), full_precision(targets)
    with autocast_off(predictions):
        units = F.normalize(predictions, dim=-1, eps=1e-6)
        others = F.normalize(targets, dim=-1, eps=1e-6).flip(0)
        return (units - others).square().sum(dim=-1).mean(dim=1).sum()
