"""Crops: drawn as torchvision draws them, cut out, resized, mirrored and rotated, all in 8 bits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

ATTEMPTS = 10
RATIOS = (3 / 4, 4 / 3)
# A crop decoded at half its size must keep that many pixels a side for each of the view.
_REDUCED_MARGIN = 2


class Crop(NamedTuple):
    """Rectangle of an image, pixels."""

    top: int
    left: int
    height: int
    width: int

    def reduced(self, reduction: int) -> "Crop":
        """Scale to an image decoded at 1/`reduction` of its size; each edge moves by less than one of its pixels."""
        top, left = self.top // reduction, self.left // reduction
        bottom, right = (self.top + self.height) // reduction, (self.left + self.width) // reduction
        return Crop(top, left, bottom - top, right - left)


def draw_crop(numbers: Sequence[float], size: tuple[int, int], scale: tuple[float, float]) -> Crop:
    """Draw a crop as torchvision's RandomResizedCrop does: an area, an aspect ratio, a place.

    Args:
        numbers: 4 * `ATTEMPTS` uniform numbers in [0, 1); an attempt that does not fit the image leads to the next.
        size: Width and height of the image.
        scale: Range of the crop's share of the image area.

    Returns:
        The first attempt that fits; if none does, the largest central crop of an allowed aspect ratio.
    """
    width, height = size
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for attempt in range(ATTEMPTS):
        of_area, of_ratio, of_top, of_left = numbers[4 * attempt : 4 * attempt + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * of_area)
        ratio = math.exp(low + (high - low) * of_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int((height - crop_height + 1) * of_top), int((width - crop_width + 1) * of_left)
            return Crop(top, left, crop_height, crop_width)
    crop_width, crop_height = width, height
    if width / height < RATIOS[0]:
        crop_height = round(width / RATIOS[0])
    elif width / height > RATIOS[1]:
        crop_width = round(height * RATIOS[1])
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def reduction_for(crop: Crop, size: int) -> int:
    """Choose at what fraction of its size a JPEG may be decoded for this crop: 2 is half of it.

    Half, where the view stays at least twice smaller than the half: what that loses, the view's own reduction would
    have smoothed away. Against full decoding, on photographs enlarged to 9 megapixels, the views differ by 0.2 levels
    of 255 on average and 4 at most; with strong film grain added, by 0.5 and 4. The crop's edges move by at most a
    quarter of a pixel of the view. Decoding takes half the time; a quarter of the size would save another 8% of it,
    and differ by up to 8 levels.

    Args:
        crop: What the view shows.
        size: Side of the view.
    """
    return 2 if min(crop.height, crop.width) >= 2 * _REDUCED_MARGIN * size else 1


def cut(
    pixels: UInt8[np.ndarray, "height width 3"], crop: Crop, size: int, *, interpolation: str, flip: bool
) -> UInt8[Tensor, "3 size size"]:
    """Cut out a crop, resize it with antialiasing, and mirror it if asked for.

    Within 1 level of Pillow and of torchvision on 8-bit tensors (bicubic: 2; where Pillow resizes a tall crop along
    the columns first, its own two orders differ by more).

    Args:
        pixels: The image.
        crop: A rectangle of it.
        size: Side of the result.
        interpolation: `bilinear` or `bicubic`.
        flip: Mirror left and right.
    """
    window = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # Channels last: the layout that torch resizes fastest, the window uncopied.
    batch = torch.from_numpy(window).permute(2, 0, 1)[None]
    view = F.interpolate(batch, (size, size), mode=interpolation, antialias=True)[0]
    return (view.flip(-1) if flip else view).contiguous()


def rotate(view: UInt8[Tensor, "3 height width"], degrees: float) -> UInt8[Tensor, "3 height width"]:
    """Rotate counter-clockwise about the center, bilinear, black outside: Pillow's own rotation."""
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    rotated = np.array(image.rotate(degrees, Image.Resampling.BILINEAR))
    return torch.from_numpy(rotated).permute(2, 0, 1).contiguous()
