"""Coding length of a batch: log det(I + C), exactly or by the Taylor series of the logarithm.

N samples over all processes, D dimensions, A and B two (N, D) samples, lambda > 0.

- batch form:   C = lambda * A B^T, (N, N).
- feature form: C = lambda * A^T B, (D, D); the same determinant and the same traces of powers (Sylvester).
- series:       log det(I + C) = Tr sum_{k=1,2,...} (-1)^(k+1)/k * C^k, where the spectral radius of C is below 1.

For rows of unit length and lambda = 1/(N eps_d^2), MEC's, the radius is at most 1/eps_d^2: it is the data that make the
series converge for the paper's eps_d^2 = 0.06, by spreading the spectrum.

Reference:
    Liu, Wang, Li, Wang, "Self-Supervised Learning via Maximum Entropy Coding", NeurIPS 2022,
    https://arxiv.org/abs/2210.11464.
"""

import logging
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import rank

Form = Literal["auto", "batch", "feature"]
Distortion = Literal["paper", "code"]

# eps_d^2, the squared distortion a dimension; the authors' code sets eps^2 = 64 for D = 2048.
EPS_D_SQUARED: dict[str, float] = {"paper": 0.06, "code": 0.03125}

_STEPS_BETWEEN_CHECKS = 10

logger = logging.getLogger(__name__)


def squared_distortion(eps_d_squared: float | str) -> float:
    """Look up eps_d^2 by name, or check a number.

    Raises:
        ValueError: If it is neither `paper` nor `code` nor a positive number.
    """
    value = EPS_D_SQUARED.get(eps_d_squared, 0.0) if isinstance(eps_d_squared, str) else eps_d_squared
    if not value > 0:
        raise ValueError(
            f"`eps_d_squared` must be paper (0.06), code (0.03125) or a positive number, got {eps_d_squared!r}. "
            "Leave it out for the paper's."
        )
    return value


def check_series(order: int, form: str) -> None:
    """Check the options of the series.

    Raises:
        ValueError: If the order is below 1 or the form is unknown.
    """
    if order < 1:
        raise ValueError(f"`order` must be at least 1, got {order}. The paper's is 4.")
    if form not in ("auto", "batch", "feature"):
        raise ValueError(f"`form` must be auto, batch or feature, got {form!r}. Leave it out for the cheaper one.")


def coding_matrix(
    a: Float[Tensor, "N D"], b: Float[Tensor, "N D"], lam: float, form: Form = "auto"
) -> Float[Tensor, "r r"]:
    """Compute C = lambda * A B^T (`batch`) or lambda * A^T B (`feature`); `auto` takes the smaller, r = min(N, D)."""
    batch = form == "batch" or (form == "auto" and a.shape[0] < a.shape[1])
    return (a @ b.t() if batch else a.t() @ b) * lam


def series_trace(c: Float[Tensor, "r r"], order: int) -> Float[Tensor, ""]:
    """Compute Tr sum_{k=1..order} (-1)^(k+1)/k * C^k with ceil(order/2) - 1 products of r x r matrices.

    No power beyond ceil(order/2) is formed: Tr C^(i+j) is the sum of the entries of C^i times those of (C^j)^T.
    """
    powers = [c]
    while 2 * len(powers) < order:
        powers.append(powers[-1] @ c)
    total = c.trace()
    for k in range(2, order + 1):
        left, right = powers[(k + 1) // 2 - 1], powers[k // 2 - 1]
        total = total + (left * right.t()).sum() * ((-1) ** (k + 1) / k)
    return total


def taylor_trace(
    a: Float[Tensor, "N D"], b: Float[Tensor, "N D"], lam: float, order: int = 4, form: Form = "auto"
) -> Float[Tensor, ""]:
    """Compute the first terms of the series of log det(I + lambda A B^T).

    2 N D r operations for C and 2 r^3 (ceil(order/2) - 1) for its powers, r = min(N, D); twice that backward.

    Args:
        a: Samples; N counts the whole batch over all processes.
        b: Samples paired with them.
        lam: lambda, at least 0.
        order: Number of terms.
        form: `batch` or `feature`, the same value; `auto` takes the cheaper.

    Returns:
        Scalar in nats, of the type of `a`.

    Raises:
        ValueError: If `order` or `form` is out of range.

    Reference:
        Liu et al., MEC, 2022, https://arxiv.org/abs/2210.11464, the Taylor expansion of its coding length. Differs
        from the authors' code in: either form, not the batch form alone, and two products fewer at order 4.
    """
    check_series(order, form)
    return series_trace(coding_matrix(a, b, lam, form), order)


def log_det(a: Float[Tensor, "N D"], lam: float, form: Form = "auto") -> Float[Tensor, ""]:
    """Compute log det(I + lambda A A^T) exactly, through the Cholesky factor of the r x r matrix, r = min(N, D).

    In float64 whatever comes in: float32 products lose the small eigenvalues, and past a condition of about 1e7 the
    factorization itself. 2 N D r + r^3/3 operations forward.

    Args:
        a: Samples; N counts the whole batch over all processes.
        lam: lambda, at least 0.
        form: `batch` or `feature`, the same value; `auto` takes the cheaper.

    Returns:
        Scalar in nats, of the type of `a`; NaN if an entry of `a` is not finite.

    Raises:
        ValueError: If `form` is unknown.
    """
    check_series(1, form)
    wide = a.double()
    c = coding_matrix(wide, wide, lam, form)
    factor, failed = torch.linalg.cholesky_ex(_plus_identity(c))
    value = 2 * factor.diagonal().log().sum()
    return torch.where(failed == 0, value, torch.nan).to(a.dtype)


def cross_log_det(
    a: Float[Tensor, "N D"], b: Float[Tensor, "N D"], lam: float, form: Form = "auto"
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the sign and the logarithm of the size of det(I + lambda A B^T), in float64 by LU.

    The matrix is not symmetric: its determinant may be negative, where no real logarithm exists, or 0, where the
    second value is minus infinity and has no gradient.

    Args:
        a: Samples; N counts the whole batch over all processes.
        b: Samples paired with them.
        lam: lambda, at least 0.
        form: `batch` or `feature`, the same value; `auto` takes the cheaper.

    Returns:
        Sign (-1, 0 or 1) and log |det| in nats, of the type of `a`.

    Raises:
        ValueError: If `form` is unknown.
    """
    check_series(1, form)
    c = coding_matrix(a.double(), b.double(), lam, form)
    sign, log_size = torch.linalg.slogdet(_plus_identity(c))
    return sign.to(a.dtype), log_size.to(a.dtype)


@torch.no_grad()
def spectral_radius(c: Float[Tensor, "r r"], iterations: int = 32) -> Float[Tensor, ""]:
    """Estimate the largest absolute eigenvalue of C by how much it stretches a vector, 2 r^2 operations a step.

    The geometric mean of the last half of the steps, which a complex pair does not upset. The start is drawn from a
    fixed seed. Where C is symmetric the estimate errs on the low side only.
    """
    vector = torch.randn(c.shape[0], generator=torch.Generator().manual_seed(0), dtype=c.dtype).to(c.device)
    stretches = []
    for _ in range(iterations):
        vector = c @ (vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(c.dtype).tiny))
        stretches.append(torch.linalg.vector_norm(vector))
    return torch.stack(stretches[iterations // 2 :]).log().mean().exp()


class DivergenceCheck:
    """Says once, in the log of the first process, that the series does not converge.

    Reading the radius waits for the device, hence only every 10 steps.
    """

    def __init__(self) -> None:
        self._said = False

    def __call__(self, radius: Float[Tensor, ""], order: int, step: int) -> None:
        """Check the radius that a training step found."""
        if self._said or step % _STEPS_BETWEEN_CHECKS or rank() or not radius > 1:
            return
        self._said = True
        logger.warning(
            "The series of `order` %d does not converge for these embeddings: the spectral radius of C is %.3g, above "
            "1. It no longer approximates the log-determinant; odd orders then reward collapse, even ones push away "
            "from it too hard. Raise `eps_d_squared` (above 1 the series always converges) or pass exact=true.",
            order,
            radius.item(),
        )


def _plus_identity(c: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    return c + torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
