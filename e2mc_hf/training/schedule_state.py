"""What the rest of a run depends on besides its state: a resumed run has the same, or says what it changes.

Without this, transformers mixes both: peak learning rate and weight decay of the checkpoint, length, kind and warm-up
of the schedule as they are given now.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from e2mc_hf.errors import UsageError
from e2mc_hf.training.saved_arguments import without_secrets

FILE = "schedule_state.json"
# What `new_schedule` may change: the state of model and optimizer means the same under any of them.
_SCHEDULE = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "momentum",
    "layer_decay",
    "max_grad_norm",
    "regularizer_warmup_epochs",
)
# Another of these is another run: it begins from the model of the old one, not from its state.
_LOSS = (
    "optimizer",
    "regularizer",
    "regularizer_args",
    "batch_norm",
    "bf16",
    "fp16",
    "tf32",
    "freeze_blocks",
    "lora_rank",
)
_OF_THE_MODEL = ("objective", "objective_args")
_SHARDING = "sharding"  # whose writers wrote the weights


def schedule_state(args: Any, model_config: Any, total_steps: int | None, sharding: str = "none") -> dict[str, Any]:
    """Options that the rest of a run depends on, as JSON has them.

    Args:
        args: Training arguments.
        model_config: Configuration of the model; `objective` and `objective_args` are taken from it where it has them.
        total_steps: Steps of the whole run, however they were asked for; None if they are not known yet.
        sharding: Whether fsdp or deepspeed divides the weights, or none.
    """
    options = {name: getattr(args, name, None) for name in (*_SCHEDULE, *_LOSS)}
    options |= {name: getattr(model_config, name, None) for name in _OF_THE_MODEL}
    options |= {"tf32": bool(options["tf32"]), _SHARDING: sharding}
    state: dict[str, Any] = json.loads(json.dumps(without_secrets(options | {"total_steps": total_steps})))
    return state


def read_schedule_state(checkpoint: Path | str) -> dict[str, Any]:
    """Options of a verified checkpoint."""
    return dict(json.loads((Path(checkpoint) / FILE).read_text(encoding="utf-8")))


def changed_schedule(saved: Mapping[str, Any], now: Mapping[str, Any], *, new_schedule: bool) -> list[str]:
    """Compare the options of a checkpoint with those of the run that resumes it.

    Args:
        saved: Options of the checkpoint, with the steps of its whole run.
        now: Options given now.
        new_schedule: Whether those of schedule and optimizer may change.

    Returns:
        What changes, a line for each option with both values; nothing without `new_schedule`.

    Raises:
        UsageError: If an option differs that must not; names each with both values.
    """
    differing = [name for name in (*_SCHEDULE, *_LOSS, *_OF_THE_MODEL, _SHARDING) if saved.get(name) != now.get(name)]
    if now["max_steps"] > 0:  # counted in steps: epochs have no effect, and the same length is no change
        same = ["num_train_epochs"] + ["max_steps"] * (now["max_steps"] == saved["total_steps"])
        differing = [name for name in differing if name not in same]
    changes = {name: f"{name} (then {saved.get(name)}, now {now.get(name)})" for name in differing}
    other_loss = [text for name, text in changes.items() if name not in _SCHEDULE]
    if other_loss:
        raise UsageError(
            "`resume_from_checkpoint` must go on with the loss of the interrupted run, got another"
            f" {', '.join(other_loss)}. Resume with the old options, or start a new run from the checkpoint's model."
        )
    if changes and not new_schedule:
        raise UsageError(
            "`resume_from_checkpoint` must go on with the schedule of the interrupted run, got another"
            f" {', '.join(changes.values())}. Resume with the old options, or pass --new_schedule to go on from its"
            " step with those given now."
        )
    return list(changes.values())


def options_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Everything that parameter groups say besides the parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def take_up_schedule(
    optimizer: torch.optim.Optimizer, scheduler: Any, groups: list[dict[str, Any]], base_rates: list[float]
) -> None:
    """Let options given now win over those that came with the state of an optimizer.

    The learning rate goes on as the new schedule's function of the steps taken, not of those left.

    Args:
        optimizer: Optimizer with its state loaded.
        scheduler: Scheduler with its state loaded: it knows the steps taken.
        groups: Options of the parameter groups as they were before.
        base_rates: Learning rates that the scheduler multiplies, as they were before.

    Raises:
        UsageError: If the schedule is not a function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UsageError(
            f"`new_schedule` needs a schedule that is a function of the step, got {type(scheduler).__name__}."
            " Choose another --lr_scheduler_type."
        )
    scheduler.base_lrs = list(base_rates)
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(base_rates, factors, strict=True)]
    for group, options, rate in zip(optimizer.param_groups, groups, rates, strict=True):
        group.update(options | {"lr": rate})
    scheduler._last_lr = list(rates)
