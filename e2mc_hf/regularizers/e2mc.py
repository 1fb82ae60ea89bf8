"""E2MC, the paper on one page: spread each coordinate over the unit interval, and decorrelate the coordinates.

V views, N samples over all processes, D dimensions.

    z (V, N, D)  --sigmoid or normal CDF-->  u in (0, 1)
    entropy      = mean over views, mean over dimensions of H(u_j)             up
    covariance   = sum over views of 1/D * sum_{j != k} C_jk(u)^2              down
    loss         = covariance_weight * covariance - entropy_weight * entropy
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.regularizers.covariance import off_diagonal_covariance
from e2mc_hf.regularizers.entropy import Estimator, check_estimator, marginal_entropy
from e2mc_hf.regularizers.output import RegularizerOutput
from e2mc_hf.regularizers.precision import autocast_off, full_precision
from e2mc_hf.regularizers.unit_cube import Transform, unit_cube_map


class E2MCRegularizer(nn.Module):
    """Effective entropy maximization of embeddings: marginal entropies up, off-diagonal covariances down.

    The terms are `marginal_entropy` (nats) and `off_diagonal_covariance`. A term of weight 0 is computed for the log
    only and takes no part in the gradient. No parameters; float32 under autocast, float64 for float64 embeddings.

    Args:
        entropy_weight: beta of the paper: 1000 for VICReg, 1 for SwAV, 0.001 for SimSiam.
        covariance_weight: gamma of the paper: 100 for VICReg, 25 for SwAV, 0.01 for SimSiam.
        transform: Map to the unit cube: `sigmoid` for objectives without normalization (VICReg), `normal_cdf` for
            objectives that L2-normalize (SwAV, SimSiam), applied before they do.
        estimator: `m_spacings` (the paper's) or `kde`.
        window: m of the spacings; round(sqrt(N)) of the whole batch when not given.
        eps: Added to a scaled spacing before the logarithm.
        bias_correction: Report the entropy with van Es' correction; the gradient is the same.
        debias_covariance: Subtract what independent dimensions score by chance in a batch of N.

    Raises:
        ValueError: If an option is out of range, unknown, or does not fit the estimator.

    Reference:
        Chakraborty, LeCun, Rudner, Learned-Miller, "Improving Pre-trained Self-Supervised Embeddings Through Effective
        Entropy Maximization", AISTATS 2025, https://arxiv.org/abs/2411.15931, Eq. 7-8, Algorithm 1. Differs from the
        paper in: the mean, not the sum, of the entropy over views, as in the authors' code.
    """

    def __init__(
        self,
        entropy_weight: float = 1000.0,
        covariance_weight: float = 100.0,
        transform: Transform = "sigmoid",
        *,
        estimator: Estimator = "m_spacings",
        window: int | None = None,
        eps: float = 1e-7,
        bias_correction: bool = False,
        debias_covariance: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (("entropy_weight", entropy_weight), ("covariance_weight", covariance_weight)):
            if not weight >= 0:
                raise ValueError(f"`{name}` must not be negative, got {weight}. Pass 0 to leave the term out.")
        unit_cube_map(transform)
        check_estimator(estimator, window, eps, bias_correction, None)
        self.entropy_weight = entropy_weight
        self.covariance_weight = covariance_weight
        self.transform: Transform = transform
        self.estimator: Estimator = estimator
        self.window = window
        self.eps = eps
        self.bias_correction = bias_correction
        self.debias_covariance = debias_covariance

    def extra_repr(self) -> str:
        """Options as they were given, for `print(regularizer)`."""
        return (
            f"entropy_weight={self.entropy_weight}, covariance_weight={self.covariance_weight}, "
            f"transform={self.transform!r}, estimator={self.estimator!r}, window={self.window}"
        )

    def forward(self, embeddings: Float[Tensor, "V N D"]) -> RegularizerOutput:
        """Regularize the embeddings of the whole batch.

        Args:
            embeddings: Projector outputs before any normalization; N counts the batch over all processes, and every
                process passes the same tensor.

        Returns:
            Loss and the two unweighted terms.

        Raises:
            ValueError: If N < 4, too few samples for entropies.
        """
        if embeddings.shape[1] < 4:
            raise ValueError(
                f"`embeddings` must hold at least 4 samples over all processes, got {embeddings.shape[1]}. "
                "Raise the batch size."
            )
        embeddings = full_precision(embeddings)
        with autocast_off(embeddings):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_weight > 0):
                entropy = torch.stack([self._entropy(view) for view in embeddings]).mean()
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.covariance_weight > 0):
                covariance = torch.stack([self._covariance(view) for view in embeddings]).sum()
            loss = self.covariance_weight * covariance - self.entropy_weight * entropy
        terms = {"marginal_entropy": entropy.detach(), "off_diagonal_covariance": covariance.detach()}
        return RegularizerOutput(loss, terms)

    def _entropy(self, view: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        return marginal_entropy(
            view,
            transform=self.transform,
            estimator=self.estimator,
            window=self.window,
            eps=self.eps,
            bias_correction=self.bias_correction,
        ).mean()

    def _covariance(self, view: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        return off_diagonal_covariance(unit_cube_map(self.transform).cdf(view), debias=self.debias_covariance)
