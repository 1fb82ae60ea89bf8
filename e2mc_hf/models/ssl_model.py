"""The model that is trained: a backbone, the objective on top of it and, where that asks for one, a teacher."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.objectives.registry import build_objective
from e2mc_hf.objectives.teacher import freeze, set_teacher_mode, update_teacher
from e2mc_hf.progress import Progress


@dataclass
class SSLOutput(ModelOutput):
    """Loss of a batch, the embeddings a regularizer acts on, and the objective's terms.

    Attributes:
        loss: Objective of this process' images, scalar.
        embeddings: Projector outputs before any normalization, (V, B, D).
        terms: The objective's terms: scalars, unweighted, detached.
    """

    # A Tensor; typed loosely because ModelOutput also takes all fields as one mapping in this place (autocast does so).
    loss: Any = None
    embeddings: Tensor | None = None
    terms: dict[str, Tensor] | None = None


@no_type_check  # by jaxtyping, in the tests: it would refuse the further keywords that transformers accepts
class SSLConfig(PreTrainedConfig):
    """Everything needed to build an `SSLModel` without weights.

    Attributes:
        backbone: Configuration of the backbone, as its `to_dict` gives it.
        add_pooling_layer: False for a transformers model built without its pooler.
        image_settings: What the backbone expects of its images.
        num_features: F, width of the backbone's features.
        objective: Name of the objective.
        objective_args: Options of the objective.
    """

    model_type = "e2mc_ssl"

    backbone: dict[str, Any] | None = None
    add_pooling_layer: bool = True
    image_settings: dict[str, Any] | None = None
    num_features: int = 0
    objective: str = "vicreg"
    objective_args: dict[str, Any] | None = None


class SSLModel(PreTrainedModel):
    """A backbone with a self-supervised objective; `save_pretrained` keeps heads, teacher and state.

    Args:
        config: Configuration of backbone and objective.
        backbone: Backbone with its weights; one with random weights is built when not given.

    Attributes:
        backbone: What is trained and exported.
        objective: Heads, state and loss of the method.
        teacher: Exponential moving average of the backbone, frozen; None for a method without one.
    """

    config: SSLConfig
    config_class = SSLConfig
    base_model_prefix = ""
    main_input_name = "views"
    supports_gradient_checkpointing = True

    def __init__(self, config: SSLConfig, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else _build_backbone(config)
        self.objective = build_objective(config.objective, config.objective_args or {}, config.num_features)
        self.teacher = copy.deepcopy(self.backbone) if self.objective.has_teacher else None
        self.freeze_teacher()
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and freeze the teacher again: parameters come trainable from a file."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_teacher()
        return loaded

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        objective: str = "vicreg",
        objective_args: Mapping[str, Any] | None = None,
        *,
        image_size: int | None = None,
        other_sizes: Sequence[int] = (),
    ) -> "SSLModel":
        """Put new heads on a loaded backbone.

        Args:
            backbone: Backbone with its weights; taken over, not copied.
            objective: Name of the objective.
            objective_args: Options of the objective.
            image_size: Side of the views in pixels; the backbone's own when not given.
            other_sizes: Sides of small views.

        Raises:
            UsageError: If an option is unknown, the backbone refuses views of that size, or it could not be saved.
        """
        parameters = dict(backbone.named_parameters(remove_duplicate=False))
        shared = len(parameters) - len(set(parameters.values()))
        if shared:
            raise UsageError(
                f"`model` must not hold a weight under several names, which safetensors cannot save, got {shared} such "
                "names. Choose another architecture."
            )
        sizes = (image_size or backbone.image_settings.size, *other_sizes)
        description = backbone.model.config.to_dict()
        description.pop("_name_or_path", None)  # a path on this machine
        config = SSLConfig(
            backbone=description,
            add_pooling_layer=getattr(backbone.model, "pooler", True) is not None,
            image_settings=asdict(backbone.image_settings),
            num_features=backbone.measure_num_features(*sizes),
            objective=objective,
            objective_args=dict(objective_args or {}),
        )
        return cls(config, backbone)

    def encode(self, views: Sequence[Float[Tensor, "B 3 _ _"]]) -> list[Float[Tensor, "B F"]]:
        """Features of each view.

        One pass a view, or one for neighboring views of one size where the objective says so: batch statistics are
        those of a pass.
        """
        return self._encode(self.backbone, views)

    def forward(self, views: Sequence[Tensor], return_loss: bool = True) -> SSLOutput:
        """Score the views of a batch.

        Args:
            views: V tensors (B, 3, H_v, W_v), normalized by `backbone.image_settings`; large views first.
            return_loss: Kept for the Trainer, which evaluates a loss without labels only when this parameter exists.

        Returns:
            Loss, embeddings (V, B, D) and terms.
        """
        teacher_features = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_features = self._encode(self.teacher, views[: self.objective.num_large_views])
        return self.score(self.encode(views), teacher_features)

    def score(
        self, features: Sequence[Float[Tensor, "B F"]], teacher_features: Sequence[Float[Tensor, "B F"]] | None
    ) -> SSLOutput:
        """Pass the features of a batch through heads and objective; this moves the objective's state.

        Args:
            features: Those of each view on this process.
            teacher_features: Those of the teacher for the large views; None without one.
        """
        return SSLOutput(*self.objective(features, teacher_features))

    def train(self, mode: bool = True) -> "SSLModel":
        """Set the mode; a teacher follows with its batch statistics alone."""
        super().train(mode)
        if self.teacher is not None:
            set_teacher_mode(self.teacher, mode)
        return self

    def freeze_teacher(self) -> None:
        """Take the teacher, backbone and heads, out of the gradient; nothing without a teacher."""
        if self.teacher is not None:
            for _, teacher in [(self.backbone, self.teacher), *self.objective.teacher_pairs()]:
                freeze(teacher)

    def set_progress(self, progress: Progress) -> None:
        """Tell the objective how far the run has come."""
        self.objective.set_progress(progress)

    def fixed_learning_rates(self) -> dict[str, float]:
        """Heads, by their name in the model, that are trained with a learning rate of their own."""
        return {f"objective.{name}": rate for name, rate in self.objective.fixed_learning_rates().items()}

    def before_optimizer_step(self) -> None:
        """Let the objective change gradients."""
        self.objective.before_optimizer_step()

    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher, backbone and heads, after an optimizer step; nothing without a teacher.

        Args:
            momentum: Share of the old teacher; the objective's schedule when not given, 0 copies the student.
        """
        if self.teacher is None:
            return
        share = self.objective.teacher_momentum() if momentum is None else momentum
        for student, teacher in [(self.backbone, self.teacher), *self.objective.teacher_pairs()]:
            update_teacher(student, teacher, share, self.objective.teacher_buffers)

    def _encode(self, backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        if not self.objective.joint_batch_statistics:
            return [backbone(view) for view in views]
        features: list[Tensor] = []
        for group in _same_size(views):
            features += backbone(torch.cat(group)).chunk(len(group))
        return features

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every module as its own constructor initialized it."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Let the backbone do it in its own way: timm's differs from transformers'."""
        self.backbone.model._set_gradient_checkpointing(*args, **kwargs)


def _same_size(views: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views in order, neighbors of one size together."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def _build_backbone(config: SSLConfig) -> Backbone:
    options = dict(config.backbone or {})
    kind = CONFIG_MAPPING[options.pop("model_type")]
    extra = {} if config.add_pooling_layer else {"add_pooling_layer": False}
    model: PreTrainedModel = AutoModel.from_config(kind.from_dict(options), **extra)
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (config.image_settings or {}).items()
    }
    return Backbone(model, ImageSettings(**settings))
