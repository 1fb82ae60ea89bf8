"""What is left to do to a trained model before it is saved."""

import logging
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from e2mc_hf.data.retrying import RemoteFileError, RemoteFileUnreachableError
from e2mc_hf.data.workers import UnusableWorkersError
from e2mc_hf.models.lora import merge_lora
from e2mc_hf.models.norm_policy import recalibrate
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.training.trainer import E2MCTrainer

logger = logging.getLogger(__name__)

# Batches that statistics are estimated from: enough for a mean over samples whose error is far below their spread.
_MOST_BATCHES = 200


def finished_model(trainer: E2MCTrainer) -> SSLModel:
    """Trained model in the form that is saved: adapters merged, and statistics recalibrated where asked for.

    Where the images stop coming, the statistics stay as trained, with a warning: a finished run is not lost.

    Every process calls it.

    Args:
        trainer: Trainer of an `SSLModel` that has run.
    """
    sharded = trainer.sharded_model
    model = trainer.accelerator.unwrap_model(trainer.model) if sharded is None else sharded.whole(trainer.model)
    assert isinstance(model, SSLModel)
    merge_lora(model)
    if trainer.args.batch_norm == "recalibrated":
        try:
            recalibrate(model.backbone, _large_views(trainer, model.objective))
        except (UnusableWorkersError, RemoteFileUnreachableError, RemoteFileError) as error:
            logger.warning("`batch_norm` recalibrated: the statistics stay as trained, for no images came. %s", error)
    return model


def _large_views(trainer: E2MCTrainer, objective: Objective) -> Iterator[Tensor]:
    """Large views of the first batches, together or one by one as the objective passes them in training."""
    for batch in islice(trainer.get_train_dataloader(), _MOST_BATCHES):
        views = batch["views"][: objective.num_large_views]
        yield from [torch.cat(views)] if objective.joint_batch_statistics else views
