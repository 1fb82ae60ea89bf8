"""Embeddings on the unit sphere."""

import torch
from jaxtyping import Float
from torch import Tensor

# A row shorter than this has no direction: its gradient would be of the size of the inverse.
SHORTEST_ROW = 1e-8


def unit_rows(z: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Divide every row by its length; one shorter than 1e-8 becomes 0, with gradient 0, and one with NaN stays NaN."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    is_short = length <= SHORTEST_ROW
    return torch.where(is_short, 0.0, z) / torch.where(is_short, 1.0, length)
