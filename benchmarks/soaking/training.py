"""The training that is interrupted: small and real, with all that a checkpoint must bring back."""

import io
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from transformers import TrainerCallback

from benchmarks.soaking.lives import Board
from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.saving import SaveFailedError
from e2mc_hf.training.trainer import E2MCTrainer

# One of the images cannot be read: it is met, and another one taken in its place, about once in 84 steps.
BROKEN = 7
HEADS: dict[str, dict[str, Any]] = {
    "swav": {"projector_dim": 32, "hidden_dim": 64, "num_prototypes": 24, "queue_length": 64},
    "byol": {"projector_dim": 32, "hidden_dim": 64},
}


@dataclass(frozen=True)
class Setup:
    """What is trained; the same for a run with faults and the one without.

    Args:
        folder: Output folder.
        max_steps: Length of the run.
        save_steps: Steps between two checkpoints; three are kept.
        objective: swav, with a queue, or byol, with a teacher.
        batch_size: Images of a step, over all processes.
        image_size: Pixels.
        num_workers: Processes of each process that decode.
    """

    folder: Path
    max_steps: int
    save_steps: int
    objective: str = "swav"
    batch_size: int = 16
    image_size: int = 32
    num_workers: int = 0
    processes: int = 1

    def train(self, board: Board) -> None:
        """Go on with the newest whole checkpoint, or begin."""
        logging.basicConfig(level=logging.WARNING)
        model = model_of(self)
        views = ViewArguments(image_size=self.image_size, num_small_views=0)
        dataset = ViewDataset(digits(), ViewTransform(views, model.backbone.image_settings), seed=0)
        arguments = E2MCTrainingArguments(
            output_dir=str(self.folder),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.batch_size // self.processes,
            dataloader_num_workers=self.num_workers,
            learning_rate=0.01,
            regularizer="e2mc",
            logging_steps=50,
            save_strategy="steps",
            save_steps=self.save_steps,
            save_total_limit=3,
            resume_from_checkpoint="auto",
        )
        Interrupted(board, model, arguments, dataset).train(resume_from_checkpoint="auto")


def model_of(setup: Setup) -> SSLModel:
    """The model to begin with, always the same."""
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=setup.image_size)
    return SSLModel.from_backbone(backbone, setup.objective, HEADS[setup.objective], image_size=setup.image_size)


class Interrupted(E2MCTrainer):
    """Trainer that tells how far it is, and whose saves fail when the board says so."""

    def __init__(self, board: Board, *args: Any) -> None:
        super().__init__(*args)
        self.board = board
        self.add_callback(_Telling(self))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            with _files_limited_to(self.board.take_limit()):
                super()._save_checkpoint(model, trial)
        except SaveFailedError:
            self.board.tell_failed_save()
            raise

    @property
    def workers(self) -> list[int]:
        """Process ids of the loader's workers."""
        iterator = getattr(self._train_loader, "_iterator", None)
        return [worker.pid for worker in getattr(iterator, "_workers", [])]


class _Telling(TrainerCallback):
    def __init__(self, trainer: Interrupted) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.board.tell_begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.board.tell_step(state.global_step, self.trainer.workers)


@lru_cache
def digits() -> ImageSource:
    """The 1,797 scanned digits as PNG files, one of which is none."""
    files = []
    for number, scan in enumerate(load_digits().images):
        file = io.BytesIO()
        PillowImage.fromarray((scan * 15.9).astype("uint8")).save(file, format="PNG")
        files.append({"bytes": b"no image" if number == BROKEN else file.getvalue(), "path": None})
    dataset = Dataset.from_dict({"image": files}, features=Features({"image": Image()}))
    return ImageSource(dataset, "image", None, "digits", None)


@contextmanager
def _files_limited_to(size: int) -> Iterator[None]:
    """Let the operating system refuse to write files of more than so many bytes; 0 for no limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
