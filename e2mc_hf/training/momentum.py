"""Go on with the momentum that an imported checkpoint brought along."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from e2mc_hf.arguments import require
from e2mc_hf.errors import UsageError
from e2mc_hf.models.checkpoint_import import MOMENTUM_FILE


def read_momentum(folder: str) -> dict[str, Tensor]:
    """Read the momentum beside an imported model.

    Raises:
        UsageError: If there is none, or it cannot be read.
    """
    path = Path(folder) / MOMENTUM_FILE
    remedy = "Import a full checkpoint with scripts/import_checkpoint.py, or leave restore_momentum out."
    require(path.is_file(), "restore_momentum", f"needs {MOMENTUM_FILE} beside the model", folder, remedy)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"`restore_momentum` needs a readable file, got {str(path)!r}: {error}. {remedy}") from error


def restore_momentum(optimizer: torch.optim.Optimizer, model: nn.Module, momentum: Mapping[str, Tensor]) -> list[str]:
    """Put momentum buffers into a new SGD or LARS.

    Args:
        optimizer: Optimizer over parameters of `model` that has taken no step.
        model: Model whose parameters have the names of the buffers.
        momentum: Buffers by the name of their parameter; names of frozen parameters are passed over.

    Returns:
        Names of the parameters that got one.

    Raises:
        UsageError: If the optimizer has no momentum, or a buffer fits no parameter.
    """
    has_momentum = all(group.get("momentum", 0) > 0 for group in optimizer.param_groups)
    remedy = "Pass --optimizer lars or sgd with a momentum."
    kind = type(optimizer).__name__
    require(has_momentum, "restore_momentum", "needs an optimizer with momentum", kind, remedy)
    parameters = dict(model.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    strange = [name for name, buffer in momentum.items() if shapes.get(name) != buffer.shape]
    require(not strange, "restore_momentum", "must fit the parameters of the model", strange[:3], "Import it again.")
    restored = [name for name in momentum if id(parameters[name]) in trained]
    for name in restored:
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter, copy=True)
    return restored
