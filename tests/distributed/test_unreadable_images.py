"""Two processes count together what cannot be read, over an interruption too, and stop together."""

import json
import os
from pathlib import Path
from typing import Any

import torch
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
    """What a checkpoint in the second epoch says: of a whole run, and of one resumed twice."""
    images = encoded(41, {5, 7, 30})
    trainer(folder, images, 8, max_steps=9, save_strategy="steps", save_steps=1).train()
    states = [json.loads((Path(folder) / "checkpoint-9" / "data_state.json").read_text())]
    for begin, stop in ((3, 6), (6, 9)):
        resumed = trainer(folder, images, 8, max_steps=stop, save_strategy="steps", save_steps=1)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{begin}")
    return [*states, json.loads((Path(folder) / "checkpoint-9" / "data_state.json").read_text())]


def test_counts_of_all_processes_are_exact_however_often_a_run_is_resumed(tmp_path: Path) -> None:
    first, second = run_on_processes(counted, 2, str(tmp_path))
    whole, resumed = first
    assert second == first
    assert resumed == whole
    assert (whole["unreadable_earlier"]["seen"], whole["unreadable"]["seen"]) == (40, 32)
    assert 2 <= whole["unreadable_earlier"]["reasons"]["not an image"] <= 3  # one may be the image left out


def stopped(folder: str) -> tuple[int, str]:
    images = encoded(256, {*range(0, 256, 64)})
    run = trainer(folder, images, 64, max_steps=100, save_strategy="no")
    try:
        run.train()
    except UsageError as error:
        return run.state.global_step, str(error)
    return run.state.global_step, "trained on"


def test_too_many_unreadable_images_stop_all_processes_at_one_step(tmp_path: Path) -> None:
    first, second = run_on_processes(stopped, 2, str(tmp_path))
    assert first == second
    step, message = first
    assert step == 16  # the first at which 1,000 images were seen: no process alone has seen them
    assert "got 1.56%: 16 of 1,024 images" in message
