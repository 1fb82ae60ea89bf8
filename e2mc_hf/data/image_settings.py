"""What an encoder expects of its images: one record, read from the checkpoint, used for training and evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSettings:
    """Size and statistics of an encoder's input.

    Attributes:
        size: Side of the square input, pixels.
        mean: Mean of each RGB channel, in [0, 1] units.
        std: Standard deviation of each RGB channel, in [0, 1] units.
        interpolation: `bilinear` or `bicubic`.
        crop_share: Side of the evaluation crop over the side the image is resized to (timm's `crop_pct`).
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_share: float = 1.0
