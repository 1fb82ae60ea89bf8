"""Gaussian blur of batches, each sample with its own sigma, along the columns and then along the rows."""

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor
from torch.nn import functional as F

# Standard deviations that a kernel reaches to: what is beyond weighs 6e-5.
_REACH = 4.0


def kernel_size(side: int) -> int:
    """Choose the kernel of a view: odd, about a tenth of its side."""
    return max(3, side // 10 | 1)


def blur_radii(sigmas: Float32[np.ndarray, " batch"], side: int) -> Int[np.ndarray, " batch"]:
    """Count the pixels a kernel needs to either side, at most half of `kernel_size`; 0 where sigma is 0."""
    reached = np.ceil(np.minimum(_REACH * sigmas - 0.5, kernel_size(side) // 2)).astype(np.int64)
    radii: np.ndarray = np.where(sigmas > 0, reached.clip(min=1), 0)
    return radii


def blur_kernels(
    sigmas: Float32[np.ndarray, " batch"], radii: Int[np.ndarray, " batch"]
) -> Float32[np.ndarray, "batch taps"]:
    """Write out the weights of each sample, 2 * max(radii) + 1 of them, summing to 1; a delta where sigma is 0."""
    radius = int(radii.max(initial=0))
    distances = np.abs(np.arange(-radius, radius + 1))
    exponents = -0.5 * np.square(distances / np.where(sigmas > 0, sigmas, 1)[:, None])
    weights = np.where(distances <= radii[:, None], np.exp(exponents), 0)
    kernels: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return kernels


def gaussian_blur(samples: Float32[Tensor, "batch 3 h w"], kernels: Float32[Tensor, "batch taps"]) -> None:
    """Blur, mirroring at the borders; in place.

    Sums of shifted images: a third of the time of a depthwise convolution on a CPU, and in float32 also where
    convolutions are set to TF32.

    Args:
        samples: Images.
        kernels: Weights of each sample along an axis, an odd number of them.
    """
    batch, _, height, width = samples.shape
    radius = kernels.shape[1] // 2
    padded = F.pad(samples, (radius,) * 4, mode="reflect")
    columns = _weighted_sum([padded[:, :, tap : tap + height] for tap in range(2 * radius + 1)], kernels)
    # Rows in one line, their margins between them: a shift along the rows is a shift of the line. The line's end lacks
    # the last margin, which no pixel of the view lies in.
    line = columns.view(batch, 1, 1, -1)
    length = line.shape[-1] - 2 * radius
    blurred = torch.empty_like(line)
    _weighted_sum([line[..., tap : tap + length] for tap in range(2 * radius + 1)], kernels, out=blurred[..., :length])
    samples.copy_(blurred.view(columns.shape)[..., :width])


def _weighted_sum(shifted: list[Tensor], kernels: Float32[Tensor, "batch taps"], out: Tensor | None = None) -> Tensor:
    """Sum images with the weights of each sample."""
    weights = kernels[:, :, None, None, None].unbind(dim=1)
    total = torch.mul(shifted[0], weights[0], out=out)
    for image, weight in zip(shifted[1:], weights[1:], strict=True):
        total.addcmul_(image, weight)
    return total
