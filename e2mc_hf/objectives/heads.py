"""Heads that objectives put on a backbone."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


def mlp(
    widths: Sequence[int],
    *,
    hidden_bias: bool = True,
    last_bias: bool = True,
    norm: bool = True,
    last_norm: bool = False,
    last_norm_affine: bool = True,
    activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True),
) -> nn.Sequential:
    """Linear layers from `widths[0]` to `widths[-1]`, hidden ones followed by batch normalization and an activation.

    Args:
        widths: Input width, hidden widths, output width.
        hidden_bias: Bias of the hidden layers.
        last_bias: Bias of the last layer.
        norm: Batch normalization after hidden layers.
        last_norm: Batch normalization after the last layer.
        last_norm_affine: Scale and shift of that last normalization.
        activation: Makes the activation of a hidden layer.
    """
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(widths[:-1]):
        layers.append(nn.Linear(in_dim, out_dim, bias=hidden_bias))
        layers += [nn.BatchNorm1d(out_dim)] if norm else []
        layers.append(activation())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    layers += [nn.BatchNorm1d(widths[-1], affine=last_norm_affine)] if last_norm else []
    return nn.Sequential(*layers)


def projector(in_dim: int, out_dim: int, *, num_layers: int) -> nn.Sequential:
    """MLP of `num_layers` linear layers, each but the last followed by batch normalization and ReLU.

    The last layer has no bias, as in VICReg's expander; every hidden layer is as wide as the output.
    """
    return mlp([in_dim] + [out_dim] * num_layers, last_bias=False)
