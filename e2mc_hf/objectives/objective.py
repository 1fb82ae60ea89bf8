"""What every self-supervised objective has: heads, state and a loss, and what it tells the model and the Trainer."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.teacher import TeacherBuffers
from e2mc_hf.progress import Progress


class Objective(nn.Module):
    """One SSL method: from the features of the views to a loss, with the heads and the state in between.

    Built as `Kind(feature_dim, **options)`. The loss of a process may depend on all processes (through
    `e2mc_hf.distributed`); its mean over the processes is the loss of the whole batch. Heads are called `projector`,
    `predictor` and `prototypes`; what an average of the student's weights drives is called `teacher_*` and frozen.

    Attributes:
        paper: Authors, title, venue, link.
        takes_small_views: Whether views beyond the first two are accepted, as small crops.
        default_small_views: Small crops of the paper's recipe.
        has_teacher: Whether the model keeps an exponential moving average of the backbone for `teacher_features`.
        joint_batch_statistics: Whether views of one size pass the backbone as one batch, as in the authors' code;
            otherwise batch normalization sees one view at a time.
        scale_matters: Whether the loss sees the scale of embeddings; otherwise they are L2-normalized or standardized.
        num_large_views: Views that come first, at full size; a teacher sees only these.
        teacher_buffers: What becomes of the teacher's buffers, see `update_teacher`.
        progress: How far the run has come.
    """

    paper: ClassVar[str]
    takes_small_views: ClassVar[bool] = False
    default_small_views: ClassVar[int] = 0
    has_teacher: ClassVar[bool] = False
    joint_batch_statistics: ClassVar[bool] = False
    scale_matters: ClassVar[bool] = False
    num_large_views: ClassVar[int] = 2
    teacher_buffers: TeacherBuffers = "own"
    momentum: float  # of a method with a teacher

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()

    def set_progress(self, progress: Progress) -> None:
        """Learn, before the forward pass of a training step, how far the run has come."""
        self.progress = progress

    def before_optimizer_step(self) -> None:
        """Change gradients after the backward pass, such as dropping those of frozen prototypes."""

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Heads of the student, each with the teacher's."""
        return []

    def teacher_momentum(self) -> float:
        """Share of the old teacher in the new one: `momentum` at the first step of the run, 1 at the last."""
        return self.progress.cosine(self.momentum, 1.0)

    def fixed_learning_rates(self) -> dict[str, float]:
        """Submodules, by name, that are trained with a learning rate of their own, exempt from the schedule."""
        return {}

    def __call__(self, features: Sequence[Tensor], teacher_features: Sequence[Tensor] | None = None) -> ObjectiveOutput:
        """Score the views of a batch.

        Args:
            features: V tensors (B, F), the pooled backbone outputs of each view on this process, large views first.
            teacher_features: Those of the teacher's backbone for the large views, without gradient; only for
                objectives with a teacher.
        """
        output: ObjectiveOutput = super().__call__(features, teacher_features)
        return output

    def check_views(self, features: Sequence[Any]) -> None:
        """Refuse a number of views that the method has no loss for.

        Raises:
            ValueError: If there are not two views, or fewer than two for a method that takes small ones as well.
        """
        if len(features) == 2 or (self.takes_small_views and len(features) > 2):
            return
        rule = "at least 2" if self.takes_small_views else "2"
        name = type(self).__module__.split(".")[-1]  # a file is called as the recipe calls its objective
        raise ValueError(f"`num_views` must be {rule} for {name}, got {len(features)}. Pass --num_views 2.")
