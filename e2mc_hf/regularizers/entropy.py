"""Differential entropy of each coordinate of a sample.

N samples, D coordinates, m the window of the spacings, x_(1) <= ... <= x_(N) the order statistics of one coordinate.

- `m_spacings` (the paper's): H = 1/(N-m) * sum_i log( (N+1)/m * (x_(i+m) - x_(i)) + eps ), i = 1 .. N-m.
- `kde`: H = -1/N * sum_i log( 1/((N-1) h) * sum_{j != i} phi((x_i - x_j)/h) + eps ), phi the standard normal density.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from e2mc_hf.regularizers.differentiation import refuse_second_derivatives
from e2mc_hf.regularizers.precision import autocast_off, full_precision
from e2mc_hf.regularizers.unit_cube import Transform, UnitCubeMap, unit_cube_map

Estimator = Literal["m_spacings", "kde"]

# Entries of one block of coordinates: small enough to stay in a CPU's cache, large enough to keep a GPU busy.
_BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**25}


def marginal_entropy(
    x: Float[Tensor, "N D"],
    *,
    transform: Transform | None = None,
    estimator: Estimator = "m_spacings",
    window: int | tuple[int, ...] | None = None,
    eps: float = 1e-7,
    bias_correction: bool = False,
    bandwidth: float | None = None,
) -> Float[Tensor, " D"]:
    """Estimate the differential entropy of each coordinate, of `x` itself or of its image in the unit interval.

    The m-spacing estimate is biased by about -1/(2m): values of batches of different size compare only with
    `bias_correction`, which does not change the gradient. Neither estimate is proof of spread: N/m clusters of m tied
    values reach the upper bound log((N+1)/(N-m)) of samples in [0, 1].

    Args:
        x: Samples; N counts the whole batch over all processes.
        transform: Map to the unit interval applied first: `sigmoid`, `normal_cdf`, or None for `x` as it is. Spacings
            are then taken from the nearer end, so that float32 resolves them next to 1 as well as next to 0.
        estimator: `m_spacings`, O(N log N) a coordinate, or `kde`, O(N^2).
        window: m of the spacings, or several of which the estimates are averaged; round(sqrt(N)) when not given.
        eps: Added to the scaled spacing, or to the density, before the logarithm; keeps ties finite.
        bias_correction: Add the constant that makes the m-spacing estimate van Es' (1992).
        bandwidth: h of the kernel, unit of `x`; Silverman's 1.06 * std * N^(-1/5) of each coordinate when not given.

    Returns:
        Entropy of each coordinate in nats, (D,); float32, or float64 for float64 samples.

    Raises:
        ValueError: If the window leaves no spacing, or an option does not fit the estimator.

    Reference:
        Chakraborty et al., "Improving Pre-trained Self-Supervised Embeddings Through Effective Entropy Maximization",
        2025, https://arxiv.org/abs/2411.15931, Algorithm 1. Differs from the authors' code in: float32 even under
        autocast; no mean is subtracted before the sort, since spacings do not see it.
    """
    num_samples = x.shape[0]
    check_estimator(estimator, window, eps, bias_correction, bandwidth)
    if num_samples < 2:
        raise ValueError(f"`x` must hold at least 2 samples, got {num_samples}. Pass a larger batch.")
    check_window(window, num_samples)
    x = full_precision(x)
    with autocast_off(x):
        cube = unit_cube_map(transform) if transform is not None else None
        if estimator == "kde":
            return _kernel_density_entropy(cube.cdf(x) if cube else x, bandwidth, eps)
        windows = _windows(window or default_window(num_samples))
        entropy: Tensor = _MSpacingEntropy.apply(x, windows, eps, cube)
        if not bias_correction:
            return entropy
        return entropy + math.fsum(van_es_correction(num_samples, m) for m in windows) / len(windows)


def default_window(num_samples: int) -> int:
    """Window m = round(sqrt(N)) of the paper, for the N of the whole batch over all processes."""
    return round(math.sqrt(num_samples))


def batch_invariant_window(num_samples: int, reference_batch: int) -> int:
    """Window under which the entropy pulls on a sample as hard as in a batch of another size.

    A spacing of m uniform samples fluctuates by 1/sqrt(m), so the force N dH/dx_i on a sample, a difference of two
    inverse spacings, is about sqrt(2) N / m^(3/2): with m = round(sqrt(N)) it grows like N^(1/4), while an objective
    that is a mean over the batch pulls on each sample alike in any batch. With m in proportion to N^(2/3) it stays.

    Args:
        num_samples: N of the whole batch over all processes.
        reference_batch: Batch in which the weight was chosen; there the window is the paper's.
    """
    window = round(math.sqrt(reference_batch) * math.pow(num_samples / reference_batch, 2 / 3))
    return min(max(1, window), num_samples - 1)


def coprime_windows(window: int) -> tuple[int, ...]:
    """A window, and the largest without a common divisor of those at most half as wide.

    Clusters of k tied values fill the spacings of every window that k divides, so that the two have none in common.
    """
    half = window // 2
    return (window, *[k for k in range(half, 0, -1) if math.gcd(k, window) == 1][:1])


def _windows(window: int | tuple[int, ...]) -> tuple[int, ...]:
    return (window,) if isinstance(window, int) else window


def van_es_correction(num_samples: int, window: int) -> float:
    """Constant that turns the paper's estimate into van Es': sum_{k=m..N} 1/k + log(m) - log(N+1), nats.

    Reference:
        van Es, "Estimating functionals related to a density by a class of statistics based on spacings", 1992;
        `scipy.stats.differential_entropy(method="van es")`.
    """
    harmonic = math.fsum(1 / k for k in range(window, num_samples + 1))
    return harmonic + math.log(window) - math.log(num_samples + 1)


def check_window(window: int | tuple[int, ...] | None, num_samples: int) -> None:
    """Refuse a window that leaves no spacing.

    Raises:
        ValueError: If one is as large as the batch.
    """
    if window is not None and max(_windows(window)) >= num_samples:
        raise ValueError(
            f"`window` must lie between 1 and N - 1 = {num_samples - 1}, got {window}. "
            "Pass a smaller window, or leave it out for round(sqrt(N))."
        )


def check_estimator(
    estimator: str,
    window: int | tuple[int, ...] | None,
    eps: float,
    bias_correction: bool,
    bandwidth: float | None,
) -> None:
    """Check the options of `marginal_entropy` that do not depend on the samples.

    Raises:
        ValueError: If one is out of range, or does not fit the estimator.
    """
    if estimator not in ("m_spacings", "kde"):
        raise ValueError(f"`estimator` must be m_spacings or kde, got {estimator!r}. Pass one of the two.")
    if not eps >= 0:
        raise ValueError(f"`eps` must not be negative, got {eps}. The paper's is 1e-7.")
    if window is not None and min(_windows(window), default=0) < 1:
        raise ValueError(f"`window` must lie between 1 and N - 1, got {window}. Leave it out for round(sqrt(N)).")
    if estimator == "kde" and (window is not None or bias_correction):
        raise ValueError("`window` and `bias_correction` belong to m_spacings, got estimator 'kde'. Leave them out.")
    if estimator == "m_spacings" and bandwidth is not None:
        raise ValueError("`bandwidth` belongs to kde, got estimator 'm_spacings'. Leave it out, or pass window.")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"`bandwidth` must be positive, got {bandwidth}. Leave it out for Silverman's rule.")


class _MSpacingEntropy(torch.autograd.Function):
    """m-spacing entropy whose gradient is written down while the sorted values are at hand.

    Autograd would keep the int64 order and the spacings of every coordinate; this keeps one tensor like `x`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N D"], windows: tuple[int, ...], eps: float, cube: UnitCubeMap | None
    ) -> Float[Tensor, " D"]:
        num_samples, num_dims = x.shape
        entropy = x.new_zeros(num_dims)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for block in _coordinate_blocks(x):
            ordered, order = sort_coordinates(x[:, block])
            image = ordered if cube is None else _distance_to_nearer_end(ordered, cube)
            by_rank = torch.zeros_like(ordered) if gradient is not None else None
            for window in windows:
                spacings = _spacings(image, ordered, window, cube is not None)
                spacings.mul_((num_samples + 1) / window).add_(eps)
                entropy[block] += spacings.log().mean(dim=1) / len(windows)
                if by_rank is not None:
                    # d log(s_i) / dx pulls the upper end of spacing i up and its lower end down, both by 1/s_i.
                    share = (num_samples + 1) / (window * (num_samples - window)) / len(windows)
                    pull = spacings.reciprocal_().mul_(share)
                    by_rank[:, window:] += pull
                    by_rank[:, :-window] -= pull
            if gradient is not None and by_rank is not None:
                if cube is not None:
                    by_rank *= cube.density(ordered)
                gradient[:, block] = torch.empty_like(by_rank).scatter_(1, order, by_rank).t()
        ctx.save_for_backward(gradient)
        return entropy

    @staticmethod
    def backward(ctx: Any, grad_entropy: Float[Tensor, " D"]) -> tuple[Tensor, None, None, None]:
        refuse_second_derivatives("marginal_entropy")
        (gradient,) = ctx.saved_tensors
        return gradient * grad_entropy, None, None, None


def _distance_to_nearer_end(ordered: Float[Tensor, "d N"], cube: UnitCubeMap) -> Float[Tensor, "d N"]:
    """Image u in the unit interval as its signed distance to the nearer end: u below 1/2, u - 1 above.

    Two images on one side then differ by their distances, exactly as u does, and float32 resolves both ends.
    """
    return torch.copysign(cube.cdf(-ordered.abs()), -ordered)


def _spacings(
    image: Float[Tensor, "d N"], ordered: Float[Tensor, "d N"], window: int, in_unit_interval: bool
) -> Float[Tensor, "d S"]:
    """Distances of the images of x_(i) and x_(i+m), the values themselves or held as distance to the nearer end."""
    spacings = image[:, window:] - image[:, :-window]
    if not in_unit_interval:
        return spacings
    # A spacing across the middle gets back the 1 that was taken from its upper end.
    upper = torch.ge(ordered, 0, out=torch.empty_like(ordered))
    spacings += upper[:, window:] - upper[:, :-window]
    # Images of ties may differ in the last bit, and the logarithm with it, and those of neighbors change places: torch
    # computes the last entries of a tensor one by one, the others in vectors.
    spacings.masked_fill_(ordered[:, window:] == ordered[:, :-window], 0)
    return spacings.clamp_min_(0)


def _coordinate_blocks(x: Float[Tensor, "N D"]) -> Iterator[slice]:
    width = max(1, _BLOCK_ENTRIES.get(x.device.type, 2**25) // x.shape[0])
    for start in range(0, x.shape[1], width):
        yield slice(start, start + width)


def sort_coordinates(x: Float[Tensor, "N d"]) -> tuple[Float[Tensor, "d N"], Int[Tensor, "d N"]]:
    """Sort each coordinate, ties in the order of their rows: sorted values and their rows, one coordinate a row.

    Ties broken by row make value and gradient the same on one process and on many. NaN sorts to either end.
    """
    columns = torch.add(x.t(), 0.0, out=x.new_empty(x.shape[::-1]))  # -0.0 becomes 0.0: they are ties
    if columns.device.type != "cpu" or columns.dtype != torch.float32:
        return torch.sort(columns, dim=1, stable=True)
    order = _float32_order(columns)
    return columns.gather(1, order), order


def _float32_order(columns: Float[Tensor, "d N"]) -> Int[Tensor, "d N"]:
    """Rows of each coordinate in ascending order of value.

    One int64 key holds value and row, so NumPy's vectorized in-place sort of plain integers does the work: about ten
    times faster than torch.sort with indices. The bits of a float, negatives mirrored, sort like the float.
    """
    bits = columns.view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys <<= 32
    keys |= torch.arange(columns.shape[1])
    keys.numpy().sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys


def _kernel_density_entropy(x: Float[Tensor, "N D"], bandwidth: float | None, eps: float) -> Float[Tensor, " D"]:
    """Kernel density entropy, a few coordinates at a time so that no N x N x D tensor exists in either pass."""
    width = max(1, 2**24 // x.shape[0] ** 2)
    blocks = [
        checkpoint(_kernel_density_block, x[:, start : start + width], bandwidth, eps, use_reentrant=False)
        for start in range(0, x.shape[1], width)
    ]
    return torch.cat(blocks)


def _kernel_density_block(x: Float[Tensor, "N d"], bandwidth: float | None, eps: float) -> Float[Tensor, " d"]:
    num_samples = x.shape[0]
    columns = x.t()
    if bandwidth is None:
        # The floor inside the root keeps the gradient finite when a coordinate has collapsed.
        width = 1.06 * num_samples**-0.2 * (columns.var(dim=1) + eps**2).sqrt()
    else:
        width = columns.new_full((columns.shape[0],), bandwidth)
    scaled = columns / width[:, None]
    kernel = (scaled[:, :, None] - scaled[:, None, :]).square().mul(-0.5).exp()
    others = kernel.sum(dim=2) - 1
    density = others / ((num_samples - 1) * math.sqrt(2 * math.pi) * width[:, None])
    entropy: Tensor = -(density + eps).log().mean(dim=1)
    return entropy
