"""Random numbers that every process draws alike, and a resumed run again: functions of (seed, step) alone.

They are drawn on the CPU, because generators of different devices give different numbers. K directions in D dimensions
cost K D normals a step: 12 ms for K = 1024, D = 2048 on one core.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def step_generator(seed: int, step: int) -> torch.Generator:
    """Generator of a training step; neighboring seeds and steps have nothing in common."""
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def random_directions(
    num_dims: int, num_directions: int, seed: int, step: int, like: Float[Tensor, "*shape"]
) -> Float[Tensor, "K D"]:
    """Draw unit vectors, uniform on the sphere.

    Args:
        num_dims: D.
        num_directions: K.
        seed: Not negative.
        step: Training step; another step gives other directions.
        like: Tensor whose device and floating point type they get.

    Returns:
        One direction a row, (K, D).
    """
    generator = step_generator(seed, step)
    drawn = torch.randn(num_directions, num_dims, generator=generator, device="cpu", dtype=torch.float32)
    directions = drawn.to(like)
    lengths: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return directions / lengths


def check_directions(num_directions: int, seed: int) -> None:
    """Check the options of a regularizer on random directions.

    Raises:
        ValueError: If there are no directions, or the seed is negative.
    """
    if num_directions < 1:
        raise ValueError(f"`num_directions` must be at least 1, got {num_directions}. Pass some hundreds.")
    check_seed(seed)


def check_seed(seed: int) -> None:
    """Refuse a negative seed.

    Raises:
        ValueError: If it is negative.
    """
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}. Pass 0 or more.")
