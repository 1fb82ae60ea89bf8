"""Fit new heads to an encoder before the encoder is trained.

New heads send large random gradients into a good encoder: it forgets before they have learned to read it. Here the
encoder stands still, its batch statistics included, while the heads learn the same objective on the same images.
"""

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.distributed import rank
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.progress import Progress
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.callbacks import ObjectiveCallback
from e2mc_hf.training.optimizers import adamw, parameter_groups
from e2mc_hf.training.sharding import check_head_warmup
from e2mc_hf.training.trainer import E2MCTrainer

logger = logging.getLogger(__name__)

# `auto` compares mean losses of windows of about an epoch. The loss has leveled off when none of the last three windows
# was lower than the best before by this share of the whole fall.
_LEVEL = 0.02
_PATIENCE = 3
_WINDOW_STEPS = (10, 100)
_MOST_EPOCHS = 10
_MOST_STEPS = (500, 5000)  # of small and of large sets


def warm_up_heads(model: SSLModel, arguments: E2MCTrainingArguments, dataset: ViewDataset, *, new_heads: bool) -> int:
    """Train the heads of a model on a frozen encoder, with the objective alone, and leave everything else as it was.

    The regularizer takes no part, so that a run and its control start from the same heads. Schedules stand as at the
    first step of the run to come, prototypes are not frozen, and every head has the same learning rate. A teacher's
    heads follow the student's and end as a copy of them.

    Args:
        model: Model to continue.
        arguments: Arguments of the run to come. `head_warmup` says how long: a number of steps, none, or auto, which
            trains new heads until the loss levels off, at most ten epochs, and skips others.
        dataset: Images and views of the run.
        new_heads: Whether the heads are random and the encoder is not.

    Returns:
        Steps taken.
    """
    if not warm_up_is_due(arguments, new_heads=new_heads):
        return 0
    check_head_warmup(arguments, is_due=True)
    is_auto = arguments.head_warmup == "auto"
    per_epoch = max(1, len(dataset) // (arguments.per_device_train_batch_size * arguments.world_size))
    window = min(max(per_epoch, _WINDOW_STEPS[0]), _WINDOW_STEPS[1])
    most = min(max(_MOST_EPOCHS * per_epoch, _MOST_STEPS[0]), _MOST_STEPS[1]) if is_auto else int(arguments.head_warmup)
    if rank() == 0:
        logger.warning("The heads are fitted on the frozen encoder first, for at most %d steps.", most)
    callbacks: list[TrainerCallback] = [StopWhenLevel(window)] if is_auto else []
    backbones = [model.backbone] if model.teacher is None else [model.backbone, model.teacher]
    with tempfile.TemporaryDirectory() as folder, _frozen(*backbones):
        trainer = _HeadTrainer(model, _arguments_of_warm_up(arguments, folder, most), dataset, callbacks=callbacks)
        trainer.train()
    _move_teacher_heads(model, 0.0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if rank() == 0:
        _report(losses, min(window, max(1, len(losses) // 2)))
    return len(losses)


def warm_up_is_due(arguments: E2MCTrainingArguments, *, new_heads: bool) -> bool:
    """Whether the heads of a run are fitted first."""
    return arguments.head_warmup not in ("none", "0") and (new_heads or arguments.head_warmup != "auto")


def _report(losses: list[float], window: int) -> None:
    first, last = (sum(part) / len(part) for part in (losses[:window], losses[-window:]))
    logger.warning("The heads were fitted for %d steps: loss %.4g to %.4g.", len(losses), first, last)
    if len(losses) > 1 and not last < first:
        logger.warning(
            "`head_warmup` did not lower the loss: such heads may harm the encoder. Try another objective or its "
            "options, or --head_warmup_learning_rate."
        )


class _HeadTrainer(E2MCTrainer):
    """Trainer of heads alone: no schedule moves, no rate is fixed, and of a teacher only the heads follow."""

    watches_collapse = False
    writes_checkpoints = False

    def __init__(self, model: SSLModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for callback in (ObjectiveCallback, PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_TeacherHeads())

    def _announce_progress(self, model: nn.Module) -> Progress:
        return Progress(0, max(1, self.state.max_steps), self._steps_per_epoch)

    def _save_where_it_stopped(self) -> str:
        return "The heads were still being fitted, there is nothing to resume: start the run again."

    def _report(self, details: dict[str, Any]) -> str:
        return (
            "This was while the heads were fitted on the frozen encoder: nothing of the run was written. Try a lower"
            " --head_warmup_learning_rate."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = self.args.learning_rate
            self.optimizer = adamw(parameter_groups(self.model, 0.0, learning_rate=rate), rate)
        return self.optimizer


class _TeacherHeads(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: SSLModel = kwargs["model"]
        if model.teacher is not None:
            _move_teacher_heads(model, model.objective.teacher_momentum())


def _move_teacher_heads(model: SSLModel, momentum: float) -> None:
    for own, teachers in model.objective.teacher_pairs():
        update_teacher(own, teachers, momentum, model.objective.teacher_buffers)


class StopWhenLevel(TrainerCallback):
    """End a training once the loss has leveled off.

    Losses are those that transformers logs: the mean over all processes.

    Args:
        window: Steps of a window.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.losses: list[float] = []

    def on_log(  # type: ignore[override]
        self,
        args: E2MCTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Count the loss of a step."""
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        if is_level(self.losses, self.window):
            control.should_training_stop = True


def is_level(losses: list[float], window: int) -> bool:
    """Whether the last three whole windows brought no clearly lower mean loss than those before."""
    if len(losses) % window or len(losses) <= _PATIENCE * window:
        return False
    means = [sum(losses[start : start + window]) / window for start in range(0, len(losses), window)]
    best_before, best = min(means[:-_PATIENCE]), min(means)
    return best_before - best <= _LEVEL * (means[0] - best)


@contextmanager
def _frozen(*backbones: nn.Module) -> Iterator[None]:
    """Keep weights and batch statistics of backbones as they are."""
    trained = [parameter for one in backbones for parameter in one.parameters() if parameter.requires_grad]
    norms = [module for one in backbones for module in one.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_to_evaluation) for norm in norms]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _to_evaluation(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward pre-hook: the Trainer puts the whole model in training mode at every step."""
    module.training = False


def _arguments_of_warm_up(arguments: E2MCTrainingArguments, folder: str, steps: int) -> E2MCTrainingArguments:
    warm_up = copy.deepcopy(arguments)
    warm_up.output_dir = folder
    warm_up.max_steps = steps
    warm_up.regularizer, warm_up.regularizer_args = "none", {}
    warm_up.optimizer, warm_up.learning_rate = "adamw", arguments.head_warmup_learning_rate
    warm_up.layer_decay = 1.0
    warm_up.lr_scheduler_type = type(arguments.lr_scheduler_type)("constant")
    warm_up.lr_scheduler_kwargs = None
    warm_up.warmup_steps = 0
    warm_up.logging_strategy = type(arguments.logging_strategy)("steps")
    warm_up.logging_steps = 1
    warm_up.logging_first_step = False
    warm_up.freeze_blocks = warm_up.lora_rank = 0  # done already
    warm_up.torch_compile = False  # what is compiled for a frozen encoder is of no use afterwards
    warm_up.restore_momentum = False
    warm_up.save_strategy = type(arguments.save_strategy)("no")
    warm_up.eval_strategy = type(arguments.eval_strategy)("no")
    warm_up.eval_on_start = False
    warm_up.load_best_model_at_end = False
    warm_up.report_to = []
    warm_up.push_to_hub = False
    warm_up.resume_from_checkpoint = None
    warm_up.new_schedule = False
    return warm_up
