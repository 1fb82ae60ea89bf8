"""Are two checkpoints the same run? Every tensor, number and random state, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

# What says when and where a run was made, not what it is.
_NOT_STATE = ("manifest.json", "training_args.json", "config.json", "README.md")
_STATE = (
    "global_step",
    "epoch",
    "max_steps",
    "num_train_epochs",
)  # of trainer_state.json: the log counts from a resume


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two checkpoints: weights, teacher, queue, optimizer, schedule, random states, images."""
    first, second = (dict(_state(folder)) for folder in (one, two))
    names = sorted(first.keys() ^ second.keys())
    return [f"only one has {name}" for name in names] + [
        name for name in first.keys() & second.keys() if not _same(first[name], second[name])
    ]


def compared(folder: Path) -> int:
    """Number of values that are compared: tensors, numbers, texts."""
    return len(dict(_state(folder)))


def unreadable_images(checkpoint: Path) -> int:
    """Images that were met and could not be read, in the whole run."""
    state = json.loads((checkpoint / "data_state.json").read_text())
    return sum(sum(state[part]["reasons"].values()) for part in ("unreadable", "unreadable_earlier"))


def _state(folder: Path) -> Iterator[tuple[str, Any]]:
    """All values of a checkpoint by file and place."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in _NOT_STATE:
            continue
        content = _read(path)
        if name == "trainer_state.json":
            content = {key: content[key] for key in _STATE}
        yield from _leaves(name, content)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name}/{key}", part)
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for number, part in enumerate(value):
            yield from _leaves(f"{name}/{number}", part)
    else:
        yield name, value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same_kind = isinstance(two, torch.Tensor) and one.dtype == two.dtype and one.shape == two.shape
        return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and one.dtype == two.dtype and one.tobytes() == two.tobytes()
    return type(one) is type(two) and one == two
