"""MEC: the views agree and code as many nats as they can, with a slowly moving teacher on the other side.

N samples over all processes, D dimensions; p the student's predictions and z the teacher's embeddings of the two views,
rows divided by their length; eps_d^2 the squared distortion a dimension.

    lambda = 1/(N eps_d^2), smaller by a factor that falls from 8 to 1 during the warm-up
    Tr(p, z) = Tr sum_{k=1..order} (-1)^(k+1)/k * C^k, C = lambda p z^T, the series of log det(I + C)
    loss     = -1/(lambda N) * 1/2 * (Tr(p_1, z_2) + Tr(p_2, z_1)); its first-order term is minus the mean cosine
    teacher  = m * teacher + (1 - m) * student after every step, m on half a cosine from `momentum` to 1 over the run
"""

import logging
from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.distributed import all_gather, rank
from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.teacher import TeacherBuffers, check_teacher_options, freeze, set_teacher_mode
from e2mc_hf.regularizers.coding_length import (
    Distortion,
    DivergenceCheck,
    Form,
    check_series,
    coding_matrix,
    cross_log_det,
    series_trace,
    spectral_radius,
    squared_distortion,
)
from e2mc_hf.regularizers.precision import autocast_off, full_precision
from e2mc_hf.regularizers.sphere import unit_rows

_WARMUP_FACTOR = 8.0  # of 1/lambda at the first step: 256 before 32 in the authors' code

logger = logging.getLogger(__name__)


class MEC(Objective):
    """Maximum entropy coding with its projector, predictor and the teacher's projector.

    The terms are `coding_length`, that of a sample in nats, (N + D)/2 * 1/N * Tr, at the lambda of the step, and
    `spectral_radius`, the larger of the two directions: above 1 the series does not converge, which is said once in the
    log. As in SimSiam, an importer subtracts the frozen bias that the authors' files hold (`encoder.fc.6.bias`, and the
    teacher's) from the running mean of the normalization after it.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of every layer of the projector and of the predictions.
        predictor_dim: Width of the predictor's hidden layer.
        order: Terms of the series, any number from 1 (minus the mean cosine, SimSiam's loss with a teacher).
        form: N x N (`batch`) or D x D (`feature`) matrices, the same value; `auto` takes the smaller.
        exact: Take the log-determinant itself in place of the series. C is not symmetric, and where the determinant is
            not positive no logarithm exists: that direction then counts with the first term of the series, which pulls
            the views together, and this is said once in the log.
        eps_d_squared: Squared distortion a dimension: `paper` (0.06), `code` (0.03125, for which 1/lambda = 32 at
            N = 1024) or a number; above 1 the series always converges.
        lambda_warmup_epochs: Epochs of this run in which 1/lambda falls linearly from 8 times its value to it; 0 for
            none. A continued run no longer than this never reaches the lambda of the encoder it continues.
        momentum: Share of the old teacher in the new one at the first step; it ends at 1.
        teacher_buffers: What becomes of the teacher's running statistics: `own` leaves those it gathers itself (the
            authors'), `average` treats them like parameters, `copy` takes the student's.

    Raises:
        ValueError: If an option is out of range or unknown.

    Reference:
        Liu, Wang, Li, Wang, "Self-Supervised Learning via Maximum Entropy Coding", NeurIPS 2022,
        https://arxiv.org/abs/2210.11464. Differs from the paper in: the loss over its coding length is scaled by
        2/(lambda (N + D)), as in the authors' code. Differs from that code in: eps_d^2 = 0.06, the paper's; hidden
        layers of the projector are `projector_dim` wide (the same for a ResNet-50); the cheaper form is taken.
    """

    paper = (
        "Liu, Wang, Li, Wang, Self-Supervised Learning via Maximum Entropy Coding, NeurIPS 2022, "
        "https://arxiv.org/abs/2210.11464"
    )
    has_teacher = True

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 2048,
        predictor_dim: int = 512,
        *,
        order: int = 4,
        form: Form = "auto",
        exact: bool = False,
        eps_d_squared: float | Distortion = "paper",
        lambda_warmup_epochs: float = 10.0,
        momentum: float = 0.996,
        teacher_buffers: TeacherBuffers = "own",
    ) -> None:
        super().__init__()
        if min(projector_dim, predictor_dim) < 1:
            raise ValueError(
                "`projector_dim` and `predictor_dim` must be at least 1, "
                f"got {projector_dim} and {predictor_dim}. The paper's are 2048 and 512."
            )
        if not lambda_warmup_epochs >= 0:
            raise ValueError(
                f"`lambda_warmup_epochs` must not be negative, got {lambda_warmup_epochs}. The authors' is 10."
            )
        check_teacher_options(momentum, teacher_buffers)
        check_series(order, form)
        widths = [feature_dim, projector_dim, projector_dim, projector_dim]
        self.projector = mlp(widths, hidden_bias=False, last_bias=False, last_norm=True, last_norm_affine=False)
        self.predictor = mlp([projector_dim, predictor_dim, projector_dim], hidden_bias=False)
        self.teacher_projector = freeze(deepcopy(self.projector))
        self.order = order
        self.form: Form = form
        self.exact = exact
        self.eps_d_squared = squared_distortion(eps_d_squared)
        self.lambda_warmup_epochs = lambda_warmup_epochs
        self.momentum = momentum
        self.teacher_buffers: TeacherBuffers = teacher_buffers
        self._check_convergence = DivergenceCheck()
        self._said_not_positive = False

    def train(self, mode: bool = True) -> "MEC":
        """Train or evaluate; the teacher's head follows with its batch statistics only."""
        super().train(mode)
        set_teacher_mode(self.teacher_projector, mode)
        return self

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Projector of the student with the teacher's."""
        return [(self.projector, self.teacher_projector)]

    def inverse_lambda(self, num_samples: int) -> float:
        """1/lambda = N eps_d^2 for N samples over all processes, and up to 8 times that during the warm-up."""
        factor = self.progress.linear(_WARMUP_FACTOR, 1.0, self.lambda_warmup_epochs)
        return num_samples * self.eps_d_squared * factor

    def forward(
        self,
        features: Sequence[Float[Tensor, "B F"]],
        teacher_features: Sequence[Float[Tensor, "B F"]] | None = None,
    ) -> ObjectiveOutput:
        """Project and predict the features of two views, and score them against what the teacher projects.

        Args:
            features: Pooled backbone outputs of each view on this process.
            teacher_features: Those of the teacher's backbone.

        Returns:
            Loss, the student's embeddings (2, B, D), and the terms `coding_length` and `spectral_radius` (the latter
            not when `exact`).

        Raises:
            ValueError: If there are not exactly two views, or none of the teacher's.
        """
        self.check_views(features)
        if teacher_features is None or len(teacher_features) != len(features):
            got = "none" if teacher_features is None else len(teacher_features)
            raise ValueError(f"`teacher_features` must hold both views for mec, got {got}. Pass the teacher's.")
        embeddings = torch.stack([self.projector(view) for view in features])
        predictions = torch.stack([self.predictor(view) for view in embeddings])
        with torch.no_grad():
            targets = torch.stack([self.teacher_projector(view) for view in teacher_features])
        loss, terms = self.score(predictions, targets)
        return ObjectiveOutput(loss, embeddings, terms)

    def score(
        self, predictions: Float[Tensor, "2 B D"], targets: Float[Tensor, "2 B D"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss over the samples of all processes; float32 under autocast, float64 stays float64.

        Args:
            predictions: The student's, of each view on this process.
            targets: The teacher's embeddings in the same order of the views; gradient flows into them if they ask.

        Returns:
            Loss and terms.
        """
        p, z = full_precision(predictions), full_precision(targets)
        with autocast_off(p):
            p, z = unit_rows(all_gather(p, dim=1)), unit_rows(all_gather(z, dim=1)).flip(0)
            num_samples, num_dims = p.shape[1:]
            inverse_lambda = self.inverse_lambda(num_samples)
            lengths, terms = (self._log_determinants if self.exact else self._series)(p, z, 1 / inverse_lambda)
            length = lengths.mean()
            loss = -inverse_lambda / num_samples * length
            terms["coding_length"] = (num_samples + num_dims) / 2 / num_samples * length.detach()
        return loss, terms

    def _series(
        self, p: Float[Tensor, "2 N D"], z: Float[Tensor, "2 N D"], lam: float
    ) -> tuple[Float[Tensor, " 2"], dict[str, Tensor]]:
        matrices = [coding_matrix(a, b, lam, self.form) for a, b in zip(p, z, strict=True)]
        radius = torch.stack([spectral_radius(c) for c in matrices]).max()
        if self.training:
            self._check_convergence(radius, self.order, self.progress.step)
        return torch.stack([series_trace(c, self.order) for c in matrices]), {"spectral_radius": radius}

    def _log_determinants(
        self, p: Float[Tensor, "2 N D"], z: Float[Tensor, "2 N D"], lam: float
    ) -> tuple[Float[Tensor, " 2"], dict[str, Tensor]]:
        lengths = []
        for a, b in zip(p, z, strict=True):
            sign, log_size = cross_log_det(a, b, lam, self.form)
            positive = bool(sign > 0)
            # Chosen before the graph is built: log |det| of a singular matrix has no gradient to be masked.
            lengths.append(log_size if positive else lam * (a * b).sum())
            if self.training and not positive:
                self._say_not_positive()
        return torch.stack(lengths), {}

    def _say_not_positive(self) -> None:
        if not self._said_not_positive and rank() == 0:
            logger.warning(
                "The determinant of I + C is not positive at step %d: its first-order term, the mean cosine, takes the "
                "place of its logarithm until it is. Predictions and targets are opposed in some direction; if this "
                "lasts, raise `eps_d_squared` or lengthen `lambda_warmup_epochs`.",
                self.progress.step,
            )
        self._said_not_positive = True
