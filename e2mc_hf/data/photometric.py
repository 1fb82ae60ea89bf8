"""Colors of whole batches on the training device: jitter, grayscale, blur, solarization, normalization."""

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from e2mc_hf.data.blur import blur_kernels, blur_radii, gaussian_blur
from e2mc_hf.data.draws import Colors
from e2mc_hf.data.jitter import CONTRAST, HUE, SATURATION, blend, turn_hue

_ORDERS = np.array(list(permutations(range(4))))
# Bytes of samples worked on at once. On a CPU what stays in the cache: one sample of 224 pixels, which then takes no
# step it has no part in. Elsewhere enough to keep the device busy, and few beside the memory that training needs.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 20, 1 << 25


class Photometry:
    """Apply each sample's own colors, and normalize.

    The result is torchvision's at the same parameters, to within 1e-3: ColorJitter, RandomGrayscale, GaussianBlur,
    RandomSolarize and Normalize on float images in [0, 1]. On a CPU it does not depend on the rest of the batch.

    Args:
        mean: Mean of each channel, in [0, 1] units.
        std: Standard deviation of each channel, in [0, 1] units.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)

    @torch.no_grad()
    def __call__(
        self, views: list[UInt8[Tensor, "batch 3 _ _"]], parameters: list[Float32[Tensor, "batch parameters"]]
    ) -> list[Float32[Tensor, "batch 3 _ _"]]:
        """Work through a batch on the device of its views.

        Args:
            views: V views; they may differ in size.
            parameters: What `Colors` holds, for each view and sample. On the CPU: what is to be done is planned there,
                and elsewhere each view would wait for its device.
        """
        return [self._finish(view, rows) for view, rows in zip(views, parameters, strict=True)]

    def denormalized(self, views: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Undo the normalization."""
        mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (self.mean, self.std))
        return views * std + mean

    def _finish(self, view: UInt8[Tensor, "batch 3 h w"], parameters: Tensor) -> Float32[Tensor, "batch 3 h w"]:
        plan = _Plan(parameters.cpu().numpy(), side=view.shape[-1], device=view.device)
        mean, std = (plan.on_device(torch.tensor(values)).view(3, 1, 1) for values in (self.mean, self.std))
        finished = torch.empty(view.shape, dtype=torch.float32, device=view.device)
        bytes_each = 4 * 3 * view.shape[-2] * view.shape[-1]
        chunk = max(1, (_CPU_CHUNK if view.device.type == "cpu" else _DEVICE_CHUNK) // bytes_each)
        for start in range(0, len(view), chunk):
            part = slice(start, min(start + chunk, len(view)))
            samples = finished[part]
            samples.copy_(view[part]).mul_(1 / 255)
            plan.jitter(samples, part)
            plan.blur(samples, part)
            plan.solarize(samples, part)
            samples.sub_(mean).div_(std)
        return finished


class _Plan:
    """What is done to whom; made on the CPU, so that no step has to ask the device.

    Args:
        parameters: Rows of `Colors`.
        side: Side of the view, pixels.
        device: Where the pixels are.
    """

    def __init__(self, parameters: Float32[np.ndarray, "batch parameters"], *, side: int, device: torch.device) -> None:
        self.device = device
        columns = dict(zip(Colors._fields, parameters.T, strict=True))
        # Four steps of jitter, then grayscale, which is a saturation of 0.
        orders = _ORDERS[columns["jitter_order"].astype(int)].T
        operations = np.vstack([orders, np.full(len(parameters), SATURATION)])
        factors = np.vstack([np.take_along_axis(parameters.T[1:5], orders, 0), 1 - columns["grayscale"]])
        hues, blends = np.where(operations == HUE, factors, 0), np.where(operations == HUE, 1, factors)
        to_gray, to_mean = ((1 - blends) * (operations == kind) for kind in (SATURATION, CONTRAST))
        self.turned, self.blended, self.needs_gray = hues != 0, blends != 1, (to_gray != 0) | (to_mean != 0)
        weights = np.stack([blends, to_gray, to_mean, hues], axis=1, dtype=np.float32)
        self.weights = self.on_device(torch.from_numpy(weights))[..., None, None, None]
        self.radii = blur_radii(columns["blur_sigma"], side)
        self.kernels = self.on_device(torch.from_numpy(blur_kernels(columns["blur_sigma"], self.radii)))
        self.solarized: np.ndarray = columns["solarize"] > 0

    def on_device(self, values: Tensor) -> Tensor:
        """Copy without waiting for the device."""
        return values.to(self.device, non_blocking=self.device.type == "cuda")

    def jitter(self, samples: Float32[Tensor, "chunk 3 h w"], part: slice) -> None:
        """Jitter, each sample in its own order, and grayscale; in place."""
        for step, (keep, gray, mean, hue) in enumerate(self.weights[..., part, :, :, :]):
            if self.blended[step, part].any():
                blend(samples, keep, gray, mean, needs_gray=bool(self.needs_gray[step, part].any()))
            self._apply(turn_hue, samples, self.turned[step, part], hue)

    def blur(self, samples: Float32[Tensor, "chunk 3 h w"], part: slice) -> None:
        """Blur, in place."""
        radius = int(self.radii[part].max())
        center = self.kernels.shape[1] // 2
        kernels = self.kernels[part, center - radius : center + radius + 1]
        self._apply(gaussian_blur, samples, self.radii[part] > 0, kernels)

    def solarize(self, samples: Float32[Tensor, "chunk 3 h w"], part: slice) -> None:
        """Solarize, in place."""
        self._apply(_solarize, samples, self.solarized[part])

    def _apply(self, function: Callable[..., None], samples: Tensor, chosen: np.ndarray, *arguments: Tensor) -> None:
        """Apply a function to the chosen samples, in place."""
        if chosen.all():
            function(samples, *arguments)
        elif chosen.any():
            places = self.on_device(torch.from_numpy(np.flatnonzero(chosen)))
            some = samples.index_select(0, places)
            function(some, *(argument.index_select(0, places) for argument in arguments))
            samples.index_copy_(0, places, some)


def _solarize(samples: Float32[Tensor, "chunk 3 h w"]) -> None:
    """Invert what is at least 0.5, which is where the inverse is the smaller of the two; in place."""
    torch.minimum(samples, 1 - samples, out=samples)
