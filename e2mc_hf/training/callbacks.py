"""What happens around an optimizer step besides the step."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ObjectiveCallback(TrainerCallback):
    """Let a model change gradients before the optimizer step, and move its teacher after it.

    Models without `before_optimizer_step` and `update_teacher` are left alone.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping: frozen prototypes drop their gradients."""
        _call(kwargs["model"], "before_optimizer_step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before logging and saving, so that a checkpoint holds the moved teacher."""
        _call(kwargs["model"], "update_teacher")


class StepEndCallback(TrainerCallback):
    """Call a function after each optimizer step, before logging and saving.

    Args:
        action: Gets the number of steps taken, and whether a log line is due.
    """

    def __init__(self, action: Callable[[int, bool], None]) -> None:
        self.action = action

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call it."""
        self.action(state.global_step, control.should_log)


def _call(model: nn.Module, name: str) -> None:
    method = getattr(model, name, None)
    if method is not None:
        method()
