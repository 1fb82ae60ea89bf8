"""Radial: the length of an embedding distributed as that of a standard normal vector.

V views, N samples over all processes, D dimensions, r = ||z|| the radius, f the density of the chi distribution with D
degrees of freedom, f(r) = r^(D-1) exp(-r^2/2) / (2^(D/2-1) Gamma(D/2)).

    cross entropy = -mean of log f(r) = mean of r^2/2 - (D-1) log r, + (D/2-1) log 2 + log Gamma(D/2)     down
    entropy       = m-spacing entropy of r                                                                  up
    loss          = cross_entropy_weight * cross entropy - entropy_weight * entropy
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.entropy import check_estimator, check_window, marginal_entropy
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight


class RadialRegularizer(Regularizer):
    """Divergence of the radius from the chi distribution: with equal weights an estimate of KL(radius || chi), in nats.

    The terms are `radial_cross_entropy` and `radial_entropy` (nats), each a mean over views. It says nothing of
    directions: add it to a criterion that does (`e2mc`, `vcreg`).

    Args:
        cross_entropy_weight: Weight of the cross-entropy, which pulls the radius to sqrt(D - 1).
        entropy_weight: Weight of the entropy, which spreads it.
        window: m of the spacings; round(sqrt(N)) of the whole batch when not given.
        eps: Added to a scaled spacing before the logarithm, and floor of the radius: both stay finite at z = 0.
        bias_correction: Report the entropy with van Es' correction; the gradient is the same.

    Raises:
        ValueError: If an option is out of range.

    Reference:
        Kuang, Dagade, Chakraborty, Learned-Miller, Balestriero, Rudner, LeCun, "Radial-VCReg: More Informative
        Representation Learning Through Radial Gaussianization", 2026, https://arxiv.org/abs/2602.14272, radial
        Gaussianization loss (KL form). Differs from the paper in: the constant of the density is kept, so that the
        loss is a divergence; the variance and covariance terms of VCReg are a regularizer of their own.
    """

    paper: ClassVar[str] = (
        "Kuang et al., Radial-VCReg: More Informative Representation Learning Through Radial Gaussianization, 2026, "
        "https://arxiv.org/abs/2602.14272"
    )
    cost: ClassVar[str] = "time N (D + log N), memory N"
    min_samples: ClassVar[int] = 4

    def __init__(
        self,
        cross_entropy_weight: float = 1.0,
        entropy_weight: float = 1.0,
        *,
        window: int | None = None,
        eps: float = 1e-7,
        bias_correction: bool = False,
    ) -> None:
        check_weight("cross_entropy_weight", cross_entropy_weight)
        check_weight("entropy_weight", entropy_weight)
        super().__init__({"radial_cross_entropy": cross_entropy_weight, "radial_entropy": -entropy_weight})
        check_estimator("m_spacings", window, eps, bias_correction, None)
        if not eps > 0:
            raise ValueError(f"`eps` must be positive, got {eps}: the logarithm of a radius of 0 needs it. Pass 1e-7.")
        self.window = window
        self.eps = eps
        self.bias_correction = bias_correction

    def check_batch(self, num_samples: int) -> None:
        """Refuse a batch that is too small for an entropy, or for the window.

        Raises:
            ValueError: If N < 4, or the window leaves no spacing.
        """
        super().check_batch(num_samples)
        check_window(self.window, num_samples)

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Cross-entropy of the radius under the chi distribution, and its entropy."""
        radius = (z.square().sum(dim=2) + self.eps**2).sqrt()
        entropy = marginal_entropy(
            radius.t(), window=self.window, eps=self.eps, bias_correction=self.bias_correction
        ).mean()
        return {"radial_cross_entropy": chi_cross_entropy(radius, z.shape[2]), "radial_entropy": entropy}


def chi_cross_entropy(radius: Float[Tensor, "V N"], num_dims: int) -> Float[Tensor, ""]:
    """Mean of -log f(r), f the density of the chi distribution with `num_dims` degrees of freedom, nats.

    Written around the mode sqrt(D - 1): the terms of -log f are larger than D and cancel, which float32 would not
    survive.
    """
    constant = (num_dims / 2 - 1) * math.log(2) + math.lgamma(num_dims / 2)
    square = radius.square()
    if num_dims == 1:
        return (square / 2).mean() + constant
    freedom = num_dims - 1
    ratio = square / freedom
    excess = freedom / 2 * (ratio - 1 - torch.log(ratio))
    at_mode = freedom / 2 * (1 - math.log(freedom)) + constant
    return excess.mean() + at_mode
