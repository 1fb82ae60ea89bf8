"""DINO: the student assigns every view to prototypes as its own moving average assigns the other large view.

B samples on this process, N over all processes, V views of which the first two are large, K prototypes; s and t the
cosines of the student's and of the teacher's embeddings with their prototypes.

    student's prediction of view v   p_v = softmax(s_v / temperature)
    teacher's target of view t       q_t = softmax((t_t - center) / teacher_temperature), t = 1, 2; or Sinkhorn-Knopp
                                           over both large views of the N samples
    loss                             mean over t, mean over v != t, mean over samples of -sum_k q_t log p_v
    center                           m * center + (1 - m) * mean of t over both large views of the N samples
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.distributed import all_reduce_sum, world_size
from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.prototypes import (
    assignment_terms,
    check_at_least,
    check_positive,
    cosine_scores,
    cross_view_entropy,
)
from e2mc_hf.objectives.sinkhorn import sinkhorn
from e2mc_hf.objectives.teacher import freeze, set_teacher_mode
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class DINO(Objective):
    """DINO with the heads of student and teacher, and the center.

    The projector has three layers with GELU; its output, the bottleneck, is L2-normalized and compared with prototypes
    whose rows count with unit norm (weight normalization with a scale fixed at 1).

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of the bottleneck.
        hidden_dim: Width of the projector's hidden layers.
        num_prototypes: K.
        norm: Batch normalization after the projector's hidden layers; the paper has none for vision transformers.
        temperature: Of the student.
        teacher_temperature: Of the teacher, after its warm-up.
        teacher_temperature_start: Of the teacher at the first step.
        teacher_temperature_warmup_epochs: Passes over the images, counted from the start of this run, from the one to
            the other, on a line.
        centering: How the teacher is kept from one prototype: `mean` subtracts the center, `sinkhorn` shares the
            samples equally.
        center_momentum: m, share of the old center.
        sinkhorn_iterations: Iterations of Sinkhorn-Knopp.
        momentum: Share of the old teacher at the first step; it rises to 1 on half a cosine over the run.
        freeze_prototypes_epochs: Passes over the images, counted from the start of this run, in which the student's
            prototypes stand still.

    Raises:
        ValueError: If an option is out of range.

    Reference:
        Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision
        Transformers", ICCV 2021, https://arxiv.org/abs/2104.14294, Eq. 1-4 and section 3; the teacher's temperature
        is the paper's, 0.04 to 0.07 over 30 epochs, where the authors' script has 0.04 by default. Sinkhorn-Knopp as
        in Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024,
        https://arxiv.org/abs/2304.07193, section 4.
    """

    paper = (
        "Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, Emerging Properties in Self-Supervised Vision "
        "Transformers, ICCV 2021, https://arxiv.org/abs/2104.14294"
    )
    takes_small_views = True
    default_small_views = 8
    has_teacher = True
    joint_batch_statistics = True

    center: Tensor

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 256,
        hidden_dim: int = 2048,
        num_prototypes: int = 65536,
        *,
        norm: bool = False,
        temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30.0,
        centering: Literal["mean", "sinkhorn"] = "mean",
        center_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
        momentum: float = 0.996,
        freeze_prototypes_epochs: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least(1, projector_dim=projector_dim, hidden_dim=hidden_dim, sinkhorn_iterations=sinkhorn_iterations)
        check_at_least(2, num_prototypes=num_prototypes)
        check_at_least(
            0,
            teacher_temperature_warmup_epochs=teacher_temperature_warmup_epochs,
            freeze_prototypes_epochs=freeze_prototypes_epochs,
        )
        check_positive(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            teacher_temperature_start=teacher_temperature_start,
        )
        for name, share in {"center_momentum": center_momentum, "momentum": momentum}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {share}. Leave it out for the paper's.")
        if centering not in ("mean", "sinkhorn"):
            raise ValueError(f"`centering` must be mean or sinkhorn, got {centering!r}. Leave it out for the paper's.")
        self.projector = mlp([feature_dim, hidden_dim, hidden_dim, projector_dim], norm=norm, activation=nn.GELU)
        self.projector.apply(_initialize)
        self.prototypes = nn.Linear(projector_dim, num_prototypes, bias=False)
        self.teacher_projector = copy.deepcopy(self.projector)
        self.teacher_prototypes = copy.deepcopy(self.prototypes)
        for teacher in (self.teacher_projector, self.teacher_prototypes):
            freeze(teacher)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_warmup_epochs = teacher_temperature_warmup_epochs
        self.centering = centering
        self.center_momentum = center_momentum
        self.sinkhorn_iterations = sinkhorn_iterations
        self.momentum = momentum
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self.register_buffer("center", torch.zeros(num_prototypes))

    def train(self, mode: bool = True) -> "DINO":
        """Set the mode; the teacher's projector follows with its batch statistics alone."""
        super().train(mode)
        set_teacher_mode(self.teacher_projector, mode)
        return self

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Projector and prototypes, each with the teacher's."""
        return [(self.projector, self.teacher_projector), (self.prototypes, self.teacher_prototypes)]

    def before_optimizer_step(self) -> None:
        """Drop the gradient of the prototypes while they are frozen: no optimizer then moves or decays them."""
        if self.progress.epoch < self.freeze_prototypes_epochs:
            self.prototypes.weight.grad = None

    def forward(
        self,
        features: Sequence[Float[Tensor, "B F"]],
        teacher_features: Sequence[Float[Tensor, "B F"]] | None = None,
    ) -> ObjectiveOutput:
        """Project the features of all views as one batch, those of the teacher as another, and score them.

        Args:
            features: Pooled outputs of the backbone for each view on this process, the two large views first.
            teacher_features: Those of the teacher's backbone for the two large views.

        Returns:
            Loss, embeddings of the large views (2, B, D) and the terms `self_distillation`, `teacher_entropy` in nats
            and `prototypes_used`.

        Raises:
            ValueError: If there are fewer than two views, or not two of the teacher.
        """
        self.check_views(features)
        given = 0 if teacher_features is None else len(teacher_features)
        if teacher_features is None or given != 2:
            raise ValueError(
                f"`teacher_features` must be those of the 2 large views, got {given}. "
                "Pass the outputs of the teacher's backbone."
            )
        projected = self.projector(torch.cat(list(features))).unflatten(0, (len(features), -1))
        with torch.no_grad():
            teacher_projected = self.teacher_projector(torch.cat(list(teacher_features))).unflatten(0, (2, -1))
        return self.score(projected, teacher_projected)

    def score(self, embeddings: Float[Tensor, "V B D"], teacher_embeddings: Float[Tensor, "2 B D"]) -> ObjectiveOutput:
        """Score embeddings of this process; the loss runs in float32 under autocast, float64 stays float64.

        In training, also moves the center.
        """
        z = full_precision(embeddings)
        with autocast_off(z):
            with torch.no_grad():
                teacher_scores = cosine_scores(full_precision(teacher_embeddings), self.teacher_prototypes.weight)
                targets = self._targets(teacher_scores)
            loss = cross_view_entropy(targets, cosine_scores(z, self.prototypes.weight), self.temperature)
        if self.training and self.centering == "mean":
            self._move_center(teacher_scores)
        terms = {"self_distillation": loss.detach(), **assignment_terms(targets, "teacher")}
        return ObjectiveOutput(loss, embeddings[:2], terms)

    def _targets(self, scores: Float[Tensor, "2 B K"]) -> Float[Tensor, "2 B K"]:
        temperature = self.progress.linear(
            self.teacher_temperature_start, self.teacher_temperature, self.teacher_temperature_warmup_epochs
        )
        if self.centering == "mean":
            return ((scores - self.center) / temperature).softmax(dim=-1)
        return sinkhorn(scores.flatten(0, 1), temperature, self.sinkhorn_iterations).reshape(scores.shape)

    @torch.no_grad()
    def _move_center(self, scores: Float[Tensor, "2 B K"]) -> None:
        mean = all_reduce_sum(scores.mean(dim=(0, 1))) / world_size()
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
