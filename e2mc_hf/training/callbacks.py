"""What happens around an optimizer step besides the step."""

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


def _call(model: nn.Module, name: str) -> None:
    method = getattr(model, name, None)
    if method is not None:
        method()
