"""Runs of a second, with everything that a checkpoint must carry: a queue, batch statistics, momentum, random draws."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.image_files import encoded, map_source
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.trainer import E2MCTrainer

IMAGES, BATCH, STEPS = 20, 4, 4
HEADS = {
    "swav": {"projector_dim": 8, "hidden_dim": 8, "num_prototypes": 6, "queue_length": 8},
    "vicreg": {"projector_dim": 8},
}


class StopAfter(TrainerCallback):
    """Ends a run after a step, as an interruption right after its checkpoint does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@cache
def images() -> Any:
    return map_source(encoded(IMAGES))


def tiny_model(objective: str = "swav", heads: dict[str, Any] | None = None) -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    return SSLModel.from_backbone(backbone, objective, HEADS.get(objective, {}) | (heads or {}), image_size=32)


def tiny_run(
    folder: Path,
    *,
    objective: str = "swav",
    heads: dict[str, Any] | None = None,
    stop_after: int | None = None,
    **options: Any,
) -> E2MCTrainer:
    """A trainer of four steps that saves after each, keeping two checkpoints."""
    model = tiny_model(objective, heads)
    dataset = ViewDataset(
        images(), ViewTransform(ViewArguments(image_size=32, num_small_views=0), model.backbone.image_settings), seed=0
    )
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "learning_rate": 0.05,
        "regularizer": "none",
        "logging_steps": 1,
    } | options
    arguments = E2MCTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **options)
    trainer = E2MCTrainer(model, arguments, dataset, dataset if arguments.eval_strategy != "no" else None)
    if stop_after is not None:
        trainer.add_callback(StopAfter(stop_after))
    return trainer


def weights(trainer: E2MCTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def state_of(checkpoint: Path) -> dict[str, Any]:
    """All that the rest of a run depends on, by file: numbers, lists and tensors."""
    state: dict[str, Any] = {"model": load_file(checkpoint / "model.safetensors")}
    with safe_globals():
        for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
            state[path.name] = torch.load(path, weights_only=True)
            if path.suffix == ".pth":
                del state[path.name]["python"]  # beartype, which checks types in the tests, draws from it
    for name in ("data_state.json", "schedule_state.json"):
        state[name] = json.loads((checkpoint / name).read_text())
    return state


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Where two states are not equal, bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [text for key in first for text in differences(first[key], second[key], f"{name}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [text for number, (a, b) in pairs for text in differences(a, b, f"{name}/{number}")]
    equal = torch.equal(first, second) if isinstance(first, Tensor) else bool(np.array_equal(first, second))
    return [] if equal and type(first) is type(second) else [name]


def learning_rates(trainer: E2MCTrainer) -> dict[int, float]:
    """Learning rate logged at each step."""
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
