"""Convolutional encoders in the memory format in which the channels of a pixel lie side by side."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from e2mc_hf.arguments import require


def check_channels_last(model: nn.Module, enabled: bool) -> None:
    """Refuse the format where it would have no effect.

    Raises:
        UsageError: If it is asked for and the model has no `backbone` with two-dimensional convolutions beyond the one
            that cuts an image into patches.
    """
    backbone = getattr(model, "backbone", None)
    layers = backbone.modules() if isinstance(backbone, nn.Module) else ()
    count = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    rule = "needs an encoder of 2-D convolutions, not a patch embedding alone"
    require(count > 1 or not enabled, "channels_last", rule, f"{count} of them", "Leave it out.")


@contextmanager
def channels_last(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep the backbone of a model, its teacher, and the views they get in channels-last format.

    Values stay as they are, results are those of the usual format up to rounding. Tensors of other than four
    dimensions are not touched. Afterwards the usual format is back, which is the one that files are written in.

    Args:
        model: Model with a `backbone`, not wrapped for several processes.
        enabled: Whether to change anything.
    """
    parts = [model.backbone, getattr(model, "teacher", None)] if enabled else []
    modules = [part for part in parts if isinstance(part, nn.Module)]
    hooks = []
    for module in modules:
        module.to(memory_format=torch.channels_last)
        # A hook of a compiled module is compiled apart: a graph of its own for one operation, without `disable`.
        hooks.append(module.register_forward_pre_hook(torch.compiler.disable(_convert_views)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            module.to(memory_format=torch.contiguous_format)


def _convert_views(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(view.contiguous(memory_format=torch.channels_last) for view in inputs)
