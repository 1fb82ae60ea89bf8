"""VISReg: center and scale of each dimension, and the shape of random projections, each by a term of its own.

V views, N samples over all processes, D dimensions, mu and sigma the mean and standard deviation (over N, not N - 1) of
a dimension, K unit directions a, q_1 <= ... <= q_N quantiles of the standard normal.

    center = mean over dimensions of mu^2
    scale  = mean over dimensions of (sigma - 1)^2
    shape  = mean over directions and ranks of (x_(i) - q_i)^2,  x = a^T (z - mu) / stop_gradient(sigma)
    loss   = center_weight * center + scale_weight * scale + shape_weight * shape;  each term a mean over views
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.directions import check_directions, random_directions
from e2mc_hf.regularizers.entropy import sort_coordinates
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight


class VISRegRegularizer(Regularizer):
    """Variance and sketching regularization: a standard normal by its scale, center and sliced Wasserstein shape.

    The terms are `visreg_center`, `visreg_scale` and `visreg_shape`. Collapsed embeddings are pulled apart: the shape
    sees them divided by their standard deviation, at least `eps`.

    Args:
        center_weight: Weight of the squared means.
        scale_weight: Weight of the squared distances of standard deviations from 1.
        shape_weight: Weight of the sliced squared Wasserstein distance.
        num_directions: K, drawn anew at each step, on the CPU; 4096 in the paper.
        eps: Least standard deviation, added in squares.
        seed: Of the directions, which are the same on every process and after a resume.

    Raises:
        ValueError: If an option is out of range.

    Reference:
        Wu, Balestriero, Levine, "VISReg: Variance-Invariance-Sketching Regularization for JEPA training", 2026,
        https://arxiv.org/abs/2606.02572, Algorithm 1. Differs from the authors' code in: statistics and ranks of the
        whole batch, not of each process; quantiles at i / (N + 1) scaled to variance 1, which the standardized samples
        have, so that the shape can reach 0 and does not pull on the scale; 1024 directions, not 4096.
    """

    paper: ClassVar[str] = (
        "Wu et al., VISReg: Variance-Invariance-Sketching Regularization for JEPA training, 2026, "
        "https://arxiv.org/abs/2606.02572, Algorithm 1"
    )
    cost: ClassVar[str] = "K directions: time N D K + N K log N, memory N K + D K"

    def __init__(
        self,
        center_weight: float = 1.0,
        scale_weight: float = 1.0,
        shape_weight: float = 1.0,
        *,
        num_directions: int = 1024,
        eps: float = 1e-4,
        seed: int = 0,
    ) -> None:
        check_weight("center_weight", center_weight)
        check_weight("scale_weight", scale_weight)
        check_weight("shape_weight", shape_weight)
        super().__init__({"visreg_center": center_weight, "visreg_scale": scale_weight, "visreg_shape": shape_weight})
        check_directions(num_directions, seed)
        if not eps > 0:
            raise ValueError(f"`eps` must be positive, got {eps}: collapsed embeddings need it. Pass 1e-4.")
        self.num_directions = num_directions
        self.eps = eps
        self.seed = seed

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Center, scale and shape."""
        directions = random_directions(z.shape[2], self.num_directions, self.seed, self.step, z)
        mean = z.mean(dim=1, keepdim=True)
        centered = z - mean
        std = (centered.square().mean(dim=1, keepdim=True) + self.eps**2).sqrt()
        standardized = centered / std.detach()
        shapes = [sliced_wasserstein(view, directions) for view in standardized]
        return {
            "visreg_center": mean.square().mean(),
            "visreg_scale": (std - 1).square().mean(),
            "visreg_shape": torch.stack(shapes).mean(),
        }


def sliced_wasserstein(x: Float[Tensor, "N D"], directions: Float[Tensor, "K D"]) -> Float[Tensor, ""]:
    """Mean squared distance of the sorted projections from the quantiles of the standard normal."""
    projections = x @ directions.t()
    order = sort_coordinates(projections.detach())[1]
    quantiles = normal_quantiles(x.shape[0]).to(x)
    target = torch.empty_like(order, dtype=x.dtype).scatter_(1, order, quantiles.expand(order.shape))
    return (projections - target.t()).square().mean()


def normal_quantiles(num_samples: int) -> Float[Tensor, " N"]:
    """Quantiles of the standard normal at i / (N + 1), scaled to variance 1; float64, ascending."""
    ranks = torch.arange(1, num_samples + 1, device="cpu", dtype=torch.float64)
    quantiles: Tensor = torch.special.ndtri(ranks / (num_samples + 1))
    return quantiles / quantiles.square().mean().sqrt()
