"""Heads that objectives put on a backbone."""

from torch import nn


def projector(in_dim: int, out_dim: int, *, num_layers: int) -> nn.Sequential:
    """MLP of `num_layers` linear layers, each but the last followed by batch normalization and ReLU.

    The last layer has no bias, as in VICReg's expander; every hidden layer is as wide as the output.
    """
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)]
        in_dim = out_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim, bias=False))
