"""The whole of a continued run, from a model with its heads to one that can be exported."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.models.freezing import freeze_first_blocks
from e2mc_hf.models.lora import add_lora
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.finishing import finished_model
from e2mc_hf.training.head_warmup import warm_up_heads, warm_up_is_due
from e2mc_hf.training.sharding import check_head_warmup
from e2mc_hf.training.trainer import E2MCTrainer


class Continuation(NamedTuple):
    """What a run leaves.

    Attributes:
        model: Trained model, as it is saved.
        trainer: Its Trainer, with the log.
    """

    model: SSLModel
    trainer: E2MCTrainer


def prepare(model: SSLModel, arguments: E2MCTrainingArguments) -> None:
    """Add adapters and freeze first blocks, in backbone and teacher, as the arguments say."""
    if arguments.lora_rank:
        add_lora(model.backbone, arguments.lora_rank, teacher=model.teacher)
    for part in [model.backbone] if model.teacher is None else [model.backbone, model.teacher]:
        freeze_first_blocks(part, arguments.freeze_blocks)


def continue_pretraining(
    model: SSLModel,
    arguments: E2MCTrainingArguments,
    dataset: ViewDataset,
    *,
    new_heads: bool,
    momentum: Mapping[str, Tensor] | None = None,
    before_training: Callable[[], None] = lambda: None,
) -> Continuation:
    """Prepare, fit new heads, train, and finish, as the arguments say; every process calls it.

    Nothing is written before the training; a resumed run (`arguments.resume_from_checkpoint`) fits no heads. Call
    `trainer.refuse_failed_save()` once the model is exported: a checkpoint may be missing.

    Args:
        model: Model to continue, changed in place.
        arguments: Arguments of the run.
        dataset: Its images and views.
        new_heads: Whether the heads are random and the encoder is not: `head_warmup` auto then fits them first.
        momentum: Momentum to begin with, see `read_momentum`.
        before_training: Called once everything has been found to fit, unless the run goes on from a checkpoint.

    Raises:
        UsageError: If the arguments do not fit the model, or the batch its criterion.
    """
    check_head_warmup(arguments, is_due=warm_up_is_due(arguments, new_heads=new_heads))
    prepare(model, arguments)
    trainer = E2MCTrainer(model, arguments, dataset, momentum=momentum)
    checkpoint = trainer.checkpoint_to_resume(arguments.resume_from_checkpoint)
    if checkpoint is None:
        before_training()
        warm_up_heads(model, arguments, dataset, new_heads=new_heads)
    trainer.train(resume_from_checkpoint=checkpoint)
    return Continuation(finished_model(trainer), trainer)
