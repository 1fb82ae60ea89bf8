"""Maps of embeddings to the unit cube: symmetric distribution functions F, with F(-z) = 1 - F(z)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Transform = Literal["sigmoid", "normal_cdf"]


class UnitCubeMap(NamedTuple):
    """A distribution function F applied to every entry, and its density F'."""

    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]


def _logistic_density(z: Tensor) -> Tensor:
    tail = torch.sigmoid(-z.abs())
    return tail * (1 - tail)


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr computes 1 + erf in float32 and loses the lower tail.
    return torch.erfc(z * -math.sqrt(0.5)).mul(0.5)


def _normal_density(z: Tensor) -> Tensor:
    return z.square().mul_(-0.5).exp_().div_(math.sqrt(2 * math.pi))


UNIT_CUBE_MAPS: dict[str, UnitCubeMap] = {
    "sigmoid": UnitCubeMap(torch.sigmoid, _logistic_density),
    "normal_cdf": UnitCubeMap(_normal_cdf, _normal_density),
}


def unit_cube_map(transform: str) -> UnitCubeMap:
    """Look up a map by name.

    Raises:
        ValueError: If the name is unknown.
    """
    if transform not in UNIT_CUBE_MAPS:
        raise ValueError(f"`transform` must be sigmoid or normal_cdf, got {transform!r}. Pass one of the two.")
    return UNIT_CUBE_MAPS[transform]
