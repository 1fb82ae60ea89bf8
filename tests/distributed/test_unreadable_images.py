"""Two processes count together what cannot be read, over an interruption too, and stop together."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data.image_files import encoded, map_source
from processes import run_on_processes

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.distributed import rank, world_size
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.trainer import E2MCTrainer


def trainer(folder: str, images: list[bytes], global_batch: int, **options: Any) -> E2MCTrainer:
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size()), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=16)
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 8}, image_size=16)
    arguments = E2MCTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        regularizer="none",
        per_device_train_batch_size=global_batch // world_size(),
        **options,
    )
    transform = ViewTransform(ViewArguments(image_size=16), backbone.image_settings)
    return E2MCTrainer(model, arguments, ViewDataset(map_source(images), transform, seed=0))


def counted(folder: str) -> list[Any]:
    """Counts in a checkpoint of the second epoch: of a whole run, and of one resumed twice."""
    images = encoded(41, {5, 7, 30})
    trainer(folder, images, 8, max_steps=9, save_strategy="steps", save_steps=1).train()
    whole = counts(folder)
    for begin, stop in ((3, 6), (6, 9)):
        options = {"save_strategy": "steps", "save_steps": 1, "new_schedule": True}
        resumed = trainer(folder, images, 8, max_steps=stop, **options)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{begin}")
    return [whole, counts(folder)]


def counts(folder: str) -> dict[str, tuple[int, dict[str, int]]]:
    """Images seen and skipped, in the epoch and before; which are kept as examples depends on who met them first."""
    dist.barrier()
    state = json.loads((Path(folder) / "checkpoint-9" / "data_state.json").read_text())
    dist.barrier()
    return {name: (state[name]["seen"], state[name]["reasons"]) for name in ("unreadable", "unreadable_earlier")}


def stopped(folder: str) -> tuple[int, str]:
    images = encoded(256, {*range(0, 256, 64)})
    run = trainer(folder, images, 64, max_steps=100, save_strategy="no")
    try:
        run.train()
    except UsageError as error:
        return run.state.global_step, str(error)
    return run.state.global_step, "trained on"


def both(folder: str) -> tuple[list[Any], tuple[int, str]]:
    return counted(f"{folder}/counted"), stopped(f"{folder}/stopped")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process saw."""
    return run_on_processes(both, 2, str(tmp_path_factory.mktemp("runs")))


def test_counts_of_all_processes_are_exact_however_often_a_run_is_resumed(outcomes: list[Any]) -> None:
    (first, _), (second, _) = outcomes
    whole, resumed = first
    assert second == first
    assert resumed == whole
    assert whole == {"unreadable": (32, {"not an image": 2}), "unreadable_earlier": (40, {"not an image": 3})}


def test_too_many_unreadable_images_stop_all_processes_at_one_step(outcomes: list[Any]) -> None:
    (_, first), (_, second) = outcomes
    assert first == second
    step, message = first
    assert step == 16  # the first at which 1,000 images were seen: no process alone has seen them
    assert "got 1.56%: 16 of 1,024 images" in message
