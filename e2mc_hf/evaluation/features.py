"""An encoder and a set of images in, features and labels out."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from e2mc_hf.arguments import require
from e2mc_hf.data.workers import worker_options, workers_errors_as_here
from e2mc_hf.modes import evaluation_mode


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder makes of N images.

    Attributes:
        x: Pooled backbone output, one row an image.
        y: Class of each image.
    """

    x: Float32[np.ndarray, "N F"]
    y: Int64[np.ndarray, " N"]


def extract_features(
    encoder: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    description: str = "",
) -> Features:
    """Run a frozen encoder over every image of a dataset, in its order.

    Batch statistics are never used, so the features do not depend on the batch size. The mode of every
    module (training or not) is what it was before once the pass is over.

    Args:
        encoder: Maps (B, 3, H, W) images to (B, F) features.
        dataset: Yields (image (3, H, W), class) pairs.
        batch_size: Images in one forward pass.
        num_workers: Processes that decode images; 0 decodes in-process.
        device: Where the encoder is moved for the pass, and stays; where it is when not given.
        description: Label of the progress bar, which is shown on a terminal only.

    Raises:
        UsageError: If there is no image, or the features are not (B, F) or not finite.
    """
    if device is not None:
        encoder.to(device)
    loader = DataLoader(dataset, batch_size=batch_size, **worker_options(num_workers))
    require(len(loader) > 0, "dataset", "must hold at least one image", 0, "Check the split and `max_samples`.")
    rows, labels = [], []
    with evaluation_mode(encoder), torch.inference_mode():
        for images, classes in _progress(loader, description):
            rows.append(_forward(encoder, images))
            labels.append(torch.as_tensor(classes))
    x = torch.cat(rows).numpy()
    num_broken = int((~np.isfinite(x)).any(axis=1).sum())
    require(
        num_broken == 0,
        "encoder",
        "must give finite features",
        f"nan or inf for {num_broken} of {len(x)} images",
        "The training may have diverged, or the input may not be normalized as the encoder expects.",
    )
    return Features(x=x, y=torch.cat(labels).to(torch.int64).numpy())


def _forward(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the features of one batch, float32 on the CPU."""
    parameter = next(encoder.parameters(), None)
    features = encoder(images if parameter is None else images.to(parameter.device))
    require(
        isinstance(features, Tensor) and features.ndim == 2 and len(features) == len(images),
        "encoder",
        "must give one row of features an image, (B, F)",
        tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__,
        "Pool the output and remove the classifier.",
    )
    on_cpu: Tensor = features.float().cpu()
    return on_cpu


def _progress(loader: DataLoader[Any], description: str) -> Iterator[Any]:
    """Yield the batches, with a progress bar on stderr when it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    hidden = not sys.stderr.isatty()
    with workers_errors_as_here():
        yield from track(loader, description, console=Console(stderr=True), transient=True, disable=hidden)
