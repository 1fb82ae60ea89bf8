"""Coding rate of maximum entropy coding as a regularizer: how many nats the directions of a view's embeddings need.

V views, N samples over all processes, D dimensions, Z the rows of one view divided by their length.

    coding rate = mean over views of eps_d^2 * log det(I + Z Z^T / (N eps_d^2))        up
    loss        = -weight * coding rate
"""

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.regularizers.coding_length import (
    Distortion,
    DivergenceCheck,
    Form,
    check_series,
    coding_matrix,
    log_det,
    series_trace,
    spectral_radius,
    squared_distortion,
)
from e2mc_hf.regularizers.regularizer import Regularizer, check_weight
from e2mc_hf.regularizers.sphere import unit_rows


class MECRegularizer(Regularizer):
    """Coding rate of the embeddings' directions, by MEC's Taylor series or exactly.

    `mec_coding_rate` is the log-determinant times eps_d^2 = 1/(lambda N), as in the authors' loss: its first-order term
    is then 1 whatever N and D are. It depends on the batch through the second moments Z^T Z / N alone, so that batches
    of different size estimate the same number; its largest value r eps_d^2 log(1 + 1/(r eps_d^2)), r = min(N, D), tends
    to 1 (0.99 at r = 1024 with the paper's eps_d^2), and collapse to one direction has 0.17. `mec_spectral_radius` is
    logged only: above 1 the series does not converge, which is said once in the log.

    Args:
        weight: Weight of the coding rate. The paper states none for its add-on to SimSiam and SimCLR; 1 puts the rate,
            of size 1 by its normalization, on a par with a cosine loss. VICReg's terms are about 25 times larger.
        order: Terms of the series. While it does not converge, odd orders reward collapse.
        form: N x N (`batch`) or D x D (`feature`) matrices, the same value; `auto` takes the smaller.
        exact: Take the log-determinant itself, through a Cholesky factor, in place of the series: about as cheap here,
            where the matrix is symmetric, and finite at any spectrum.
        eps_d_squared: Squared distortion a dimension: `paper` (0.06), `code` (0.03125) or a number; above 1 the series
            always converges.

    Raises:
        ValueError: If an option is out of range or unknown.

    Reference:
        Liu, Wang, Li, Wang, "Self-Supervised Learning via Maximum Entropy Coding", NeurIPS 2022,
        https://arxiv.org/abs/2210.11464, the coding length of one view and its Taylor expansion. Differs from the
        authors' code in: one view at a time, since a regularizer has no positives, and no warm-up of lambda.
    """

    paper = (
        "Liu, Wang, Li, Wang, Self-Supervised Learning via Maximum Entropy Coding, NeurIPS 2022, "
        "https://arxiv.org/abs/2210.11464, coding length of one view and its Taylor expansion"
    )
    cost = "N D r + r^3 time, N D + r^2 memory, r = min(N, D)"

    def __init__(
        self,
        weight: float = 1.0,
        *,
        order: int = 4,
        form: Form = "auto",
        exact: bool = False,
        eps_d_squared: float | Distortion = "paper",
    ) -> None:
        check_weight("weight", weight)
        check_series(order, form)
        super().__init__({"mec_coding_rate": -weight})
        self.order = order
        self.form: Form = form
        self.exact = exact
        self.eps_d_squared = squared_distortion(eps_d_squared)
        self._check_convergence = DivergenceCheck()

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Compute the coding rate, and the spectral radius when the series is used."""
        lam = 1 / (z.shape[1] * self.eps_d_squared)
        units = unit_rows(z)
        if self.exact:
            lengths = torch.stack([log_det(view, lam, self.form) for view in units])
            return {"mec_coding_rate": self.eps_d_squared * lengths.mean()}
        matrices = [coding_matrix(view, view, lam, self.form) for view in units]
        lengths = torch.stack([series_trace(c, self.order) for c in matrices])
        radius = torch.stack([spectral_radius(c) for c in matrices]).max()
        if torch.is_grad_enabled():
            self._check_convergence(radius, self.order, self.step)
        return {"mec_coding_rate": self.eps_d_squared * lengths.mean(), "mec_spectral_radius": radius}
