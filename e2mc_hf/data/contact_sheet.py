"""Images beside the views a recipe makes of them, as one picture to look at before a run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

from e2mc_hf.data.collator import collate_views
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.decoding import EncodedImage, UnreadableImage
from e2mc_hf.data.rows import Row

_INCHES = 1.6


def write_contact_sheet(dataset: ViewDataset, path: str | Path, *, num_images: int = 8) -> Path:
    """Draw the first images of a dataset and their views of epoch 0, exactly those that training would see.

    Args:
        dataset: Images and views.
        path: PNG file to write; its folder is made.
        num_images: Rows of the sheet.

    Returns:
        The file.
    """
    rows = dataset.first_rows(num_images)
    batch = collate_views([dataset[row] for row in rows])
    views = dataset.transform.photometry(batch["views"], batch["photometry"])
    replaced = dict(batch["unreadable"])
    pictures = [
        [_original(dataset, row), *(_picture(view[number], dataset) for view in views)]
        for number, row in enumerate(rows)
    ]
    figure = _sheet(pictures, [_title(row, replaced) for row in rows])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _title(row: Row, replaced: dict[int, str]) -> str:
    reason = replaced.get(row.sample_id)
    return f"image {row.sample_id}" if reason is None else f"image {row.sample_id}\n{reason}: replaced"


def _original(dataset: ViewDataset, row: Row) -> UInt8[np.ndarray, "height width 3"]:
    """Image as it is; gray when it cannot be read."""
    try:
        return EncodedImage(dataset.encoded(row)).pixels()
    except UnreadableImage:
        return np.full((8, 8, 3), 128, dtype=np.uint8)


def _picture(view: Tensor, dataset: ViewDataset) -> UInt8[np.ndarray, "height width 3"]:
    """View without its normalization."""
    colors = dataset.transform.photometry.denormalized(view)
    return (colors.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _sheet(pictures: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """One row an image: the image, then its views."""
    columns = len(pictures[0])
    with matplotlib.rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_INCHES * columns, _INCHES * len(pictures) + 0.3), layout="constrained")
        axes = figure.subplots(len(pictures), columns, squeeze=False)
        for row, (own, title) in enumerate(zip(pictures, titles, strict=True)):
            for column, picture in enumerate(own):
                cell = axes[row, column]
                cell.imshow(picture, interpolation="nearest")
                cell.set_xticks([])
                cell.set_yticks([])
                cell.spines[:].set_visible(False)
                if row == 0 and column:
                    cell.set_title(f"view {column}\n{picture.shape[1]} px")
            axes[row, 0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure
