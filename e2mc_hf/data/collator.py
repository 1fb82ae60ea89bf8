"""Samples of views to one batch."""

from typing import Any

from torch.utils.data import default_collate

from e2mc_hf.data.dataset import Sample


def collate_views(samples: list[Sample]) -> dict[str, list[Any]]:
    """Stack each view over the samples; inside a worker straight into shared memory.

    Args:
        samples: B samples of V views; views of one image may differ in size, one view over the samples not.

    Returns:
        `views`: V uint8 tensors (B, 3, H, W). `photometry`: V float32 tensors (B, P). `unreadable`: images whose place
        another one took.
    """
    views = list(zip(*(sample.views for sample in samples), strict=True))
    return {
        "views": [default_collate([view.pixels for view in place]) for place in views],
        "photometry": [default_collate([view.photometry for view in place]) for place in views],
        "unreadable": [sample.unreadable for sample in samples if sample.unreadable is not None],
    }
