"""Maps of embeddings to the unit cube: symmetric distribution functions F, with F(-z) = 1 - F(z)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import all_reduce_sum, world_size

Transform = Literal["sigmoid", "normal_cdf"]

# Below this standard deviation a coordinate is scaled by a constant: VICReg's floor, sqrt(1e-4).
_MIN_STD = 0.01


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


def match_scale(
    z: Float[Tensor, "N D"], *, standardize: bool = False, temperature: float = 1.0, shared: bool = False
) -> Float[Tensor, "N D"]:
    """Bring coordinates to the scale of the map that follows.

    A uniform image needs a normal distribution of standard deviation 1 under `normal_cdf` and a logistic one of
    pi/sqrt(3) = 1.81 under `sigmoid`; of the normal ones, that of 1.749 comes nearest there.

    Args:
        z: Samples.
        standardize: Subtract the mean of each coordinate and divide by its standard deviation, both with gradient, so
            that a criterion of the result is blind to the scale. With a constant divisor it would not be: whatever the
            scale, the sigmoid asks for more of it. Below a standard deviation of 0.01 the divisor is 0.01.
        temperature: Divisor after that.
        shared: `z` holds the samples of this process only; mean and standard deviation are those of all.

    Returns:
        `z` itself when there is nothing to do.
    """
    if standardize:
        variance, mean = _var_mean_of_all(z) if shared else torch.var_mean(z, dim=0)
        z = (z - mean) / variance.clamp_min(_MIN_STD**2).sqrt()
    return z if temperature == 1 else z / temperature


def _var_mean_of_all(z: Float[Tensor, "B D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Variance and mean over the samples of all processes; two passes, as the difference of sums would cancel."""
    num_samples = z.shape[0] * world_size()
    mean = all_reduce_sum(z.sum(dim=0)) / num_samples
    return all_reduce_sum((z - mean).square().sum(dim=0)) / (num_samples - 1), mean


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive.

    Raises:
        ValueError: If it is not.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}. The paper's is 1.")
