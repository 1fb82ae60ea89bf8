"""What a view draws: every parameter has a fixed place among numbers hashed from (seed, epoch, sample id, view)."""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from e2mc_hf.data.geometry import ATTEMPTS, Crop, draw_crop


class Place(IntEnum):
    """Place of each parameter among the numbers of a view; a new one goes behind the last, so that no draw changes."""

    FLIP = 0
    ROTATION = 1
    JITTER = 2
    JITTER_ORDER = 3
    BRIGHTNESS = 4
    CONTRAST = 5
    SATURATION = 6
    HUE = 7
    GRAYSCALE = 8
    BLUR = 9
    BLUR_SIGMA = 10
    SOLARIZE = 11
    CROP = 12
    END = 12 + 4 * ATTEMPTS


@dataclass(frozen=True)
class ViewRecipe:
    """How one view is drawn; see `ViewArguments` for what the options mean.

    Attributes:
        size: Side of the view, pixels.
        interpolation: `bilinear` or `bicubic`.
    """

    size: int
    interpolation: str
    crop_scale: tuple[float, float]
    flip_prob: float
    rotation_degrees: float
    jitter_prob: float
    jitter_strength: tuple[float, float, float, float]
    grayscale_prob: float
    blur_prob: float
    blur_sigma: tuple[float, float]
    solarize_prob: float


class Colors(NamedTuple):
    """Photometric parameters of one view; a value that changes nothing stands for a step that is left out.

    Attributes:
        jitter_order: Which of the 24 orders of the next four, as `itertools.permutations` counts them.
        brightness: Factor; 1 changes nothing.
        contrast: Factor; 1 changes nothing.
        saturation: Factor; 1 changes nothing.
        hue: Share of the color circle to turn by, from -0.5 to 0.5; 0 changes nothing.
        grayscale: 1 or 0.
        blur_sigma: Standard deviation in pixels; 0 changes nothing.
        solarize: 1 or 0.
    """

    jitter_order: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur_sigma: float = 0.0
    solarize: float = 0.0


class ViewDraw(NamedTuple):
    """Everything that is random about one view.

    Attributes:
        crop: Rectangle of the image, pixels.
        flip: Whether to mirror the crop.
        angle: Rotation in degrees, counter-clockwise.
        colors: Photometric parameters.
    """

    crop: Crop
    flip: bool
    angle: float
    colors: Colors


def uniforms(seed: int, epoch: int, sample_id: int, view: int, count: int) -> Float64[np.ndarray, " count"]:
    """Hash uniform numbers in [0, 1), the same in every process, on every platform.

    Each is 53 bits of BLAKE2b of what the draw is for and the number of a block of eight: no generator whose state
    order or worker count could change, and fewer numbers are the beginning of more.
    """
    key = struct.pack("<4q", seed, epoch, sample_id, view)
    blocks = range(-(-count // 8))
    digests = b"".join(hashlib.blake2b(key + block.to_bytes(8, "little")).digest() for block in blocks)
    numbers: np.ndarray = (np.frombuffer(digests, dtype="<u8")[:count] >> 11) * 2.0**-53
    return numbers


def draw_view(recipe: ViewRecipe, numbers: list[float], size: tuple[int, int]) -> ViewDraw:
    """Draw the parameters of a view.

    Args:
        recipe: Their distributions.
        numbers: `Place.END` uniform numbers; those of a step that is left out are not used for another.
        size: Width and height of the image, pixels.
    """
    degrees = recipe.rotation_degrees
    return ViewDraw(
        crop=draw_crop(numbers[Place.CROP : Place.END], size, recipe.crop_scale),
        flip=numbers[Place.FLIP] < recipe.flip_prob,
        angle=_between(-degrees, degrees, numbers[Place.ROTATION]),
        colors=_draw_colors(recipe, numbers),
    )


def _draw_colors(recipe: ViewRecipe, numbers: list[float]) -> Colors:
    """Draw as torchvision's RandomApply(ColorJitter), RandomGrayscale, RandomApply(GaussianBlur), RandomSolarize do."""
    colors = Colors(
        grayscale=float(numbers[Place.GRAYSCALE] < recipe.grayscale_prob),
        blur_sigma=_between(*recipe.blur_sigma, numbers[Place.BLUR_SIGMA])
        if numbers[Place.BLUR] < recipe.blur_prob
        else 0.0,
        solarize=float(numbers[Place.SOLARIZE] < recipe.solarize_prob),
    )
    if numbers[Place.JITTER] >= recipe.jitter_prob:
        return colors
    brightness, contrast, saturation, hue = recipe.jitter_strength
    return colors._replace(
        jitter_order=float(int(24 * numbers[Place.JITTER_ORDER])),
        brightness=_between(max(0.0, 1 - brightness), 1 + brightness, numbers[Place.BRIGHTNESS]),
        contrast=_between(max(0.0, 1 - contrast), 1 + contrast, numbers[Place.CONTRAST]),
        saturation=_between(max(0.0, 1 - saturation), 1 + saturation, numbers[Place.SATURATION]),
        hue=_between(-hue, hue, numbers[Place.HUE]),
    )


def _between(low: float, high: float, number: float) -> float:
    """Scale a number in [0, 1) to a range."""
    return low + (high - low) * number
