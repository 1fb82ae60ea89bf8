"""Momentum of an author's optimizer, by the names of our parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from e2mc_hf.models.checkpoint_formats import Layout

# torch's SGD, also inside LARC; the LARS of VICReg and Barlow Twins. In all of them the buffer becomes
# momentum * buffer + update, and learning rate * buffer is subtracted: the rule of torch's SGD and timm's Lars.
_BUFFERS = ("momentum_buffer", "mu")


def momentum_of(layout: Layout) -> tuple[dict[str, Tensor], str]:
    """Read the momentum buffers.

    An optimizer numbers the parameters in its own order; which number is which parameter follows from the order in
    the file, and is confirmed by the shapes.

    Args:
        layout: Checkpoint with the state dict of its optimizer.

    Returns:
        Buffers by the name of the parameter in the file, and what is to be said about them: why there are none, or an
        empty text.
    """
    if layout.optimizer is None:
        return {}, "the file has no optimizer"
    try:
        groups, states = layout.optimizer["param_groups"], layout.optimizer["state"]
        numbers = [number for group in groups for number in group["params"]]
        entries = {number: dict(states[number]) for number in numbers if number in states}
    except (TypeError, KeyError, ValueError):
        return {}, "its optimizer has no parameter groups"
    if not any(_buffer(entry) is not None for entry in entries.values()):
        return {}, "its optimizer keeps no momentum of SGD or LARS"
    names = layout.parameters()
    if len(numbers) != len(names) or len(set(numbers)) != len(numbers):
        return {}, f"its optimizer counts {len(numbers)} parameters where the model has {len(names)}"
    found: dict[str, Tensor] = {}
    for name, number in zip(names, numbers, strict=True):
        buffer = _buffer(entries.get(number, {}))
        if buffer is None:
            continue
        if buffer.shape != layout.tensors[name].shape:
            shapes = f"{tuple(buffer.shape)} for {name} of {tuple(layout.tensors[name].shape)}"
            return {}, f"its optimizer lists the parameters in another order: {shapes}"
        found[name] = buffer.detach().float()
    return found, ""


def _buffer(entry: Mapping[Any, Any]) -> Tensor | None:
    return next((entry[name] for name in _BUFFERS if isinstance(entry.get(name), Tensor)), None)
