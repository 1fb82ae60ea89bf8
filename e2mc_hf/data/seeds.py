"""One seed for each draw: a stable hash of what the draw is for, so that order and worker count cannot matter."""

import hashlib
import struct

import torch


def derive_seed(*parts: int) -> int:
    """Hash integers to a 64-bit seed that is the same in every process, on every platform.

    Each part takes eight bytes, so that neither a large part nor a trailing zero makes two lists of equal length
    collide (numpy's `SeedSequence` has both).

    Args:
        parts: What the draw is for: seed, epoch, sample id, view.

    Returns:
        An integer in [0, 2**64). Torch's CPU generator uses 32 bits of it: of many millions of draws a few share
        their random numbers, which is harmless.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permutation(length: int, *parts: int) -> list[int]:
    """Permute `range(length)`; the order depends on `parts` alone."""
    generator = torch.Generator().manual_seed(derive_seed(*parts))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order
