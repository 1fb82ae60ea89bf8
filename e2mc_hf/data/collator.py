"""Samples of views to one batch."""

from torch import Tensor
from torch.utils.data import default_collate


def collate_views(samples: list[list[Tensor]]) -> dict[str, list[Tensor]]:
    """Stack each view over the samples; inside a worker straight into shared memory.

    Args:
        samples: B lists of V views (3, H, W); views of one image may differ in size, one view over the samples not.

    Returns:
        `views`: V tensors (B, 3, H, W).
    """
    return {"views": [default_collate(list(view)) for view in zip(*samples, strict=True)]}
