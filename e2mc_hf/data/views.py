"""Views of an image: 8-bit crops and parameters of their colors, functions of (seed, epoch, sample id, view) alone."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.draws import Place, ViewDraw, ViewRecipe, draw_view, uniforms
from e2mc_hf.data.geometry import cut, reduction_for, rotate
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.photometric import Photometry


@runtime_checkable
class DecodableImage(Protocol):
    """An image whose size is known before it is decoded; `decoding.EncodedImage` is one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""

    def pixels(self, reduction: int = 1) -> UInt8[np.ndarray, "height width 3"]:
        """Decode, at 1/`reduction` of the size if the format can."""


class View(NamedTuple):
    """A view as a worker makes it; `Photometry` does the rest, a batch at a time.

    Attributes:
        pixels: The crop, resized, mirrored and rotated.
        photometry: What `draws.Colors` holds.
    """

    pixels: UInt8[Tensor, "3 height width"]
    photometry: Float32[Tensor, " parameters"]


class ViewTransform:
    """Draw the views of an image: the large ones, then the small ones.

    A view's draw depends on its place alone: the large views are the same with and without small ones, and a step
    that is left out changes no other.

    Args:
        arguments: The recipe. Without a number of small views there are none: what an objective's own number is,
            `ViewArguments.resolved` is told.
        settings: The encoder's input size, statistics and interpolation.

    Attributes:
        recipes: How each view is drawn.
        photometry: Turns a batch of views into what the encoder takes.
    """

    def __init__(self, arguments: ViewArguments, settings: ImageSettings) -> None:
        self.recipes = _recipes(arguments, settings)
        self.photometry = Photometry(settings.mean, settings.std)
        self._num_large = arguments.num_views

    def __call__(self, image: DecodableImage, *, seed: int, epoch: int, sample_id: int) -> list[View]:
        """Draw one view with each recipe.

        Returns:
            `num_views` of the large size, then `num_small_views` of the small one.

        Raises:
            UnreadableImage: If the image cannot be decoded.
        """
        draws = [
            draw_view(recipe, uniforms(seed, epoch, sample_id, view, Place.END).tolist(), image.size)
            for view, recipe in enumerate(self.recipes)
        ]
        reductions = self._reductions(draws)
        decoded = {reduction: image.pixels(reduction) for reduction in sorted(set(reductions))}
        pixels = [
            _pixels(recipe, draw, decoded[reduction], image.size, reduction)
            for recipe, draw, reduction in zip(self.recipes, draws, reductions, strict=True)
        ]
        return [View(*view) for view in zip(pixels, torch.tensor([draw.colors for draw in draws]), strict=True)]

    def _reductions(self, draws: list[ViewDraw]) -> list[int]:
        """At what fraction of its size the image is decoded for each view.

        One fraction serves all large views, and a small view decodes more only for itself: so neither small views
        nor their number change another view.
        """
        own = [reduction_for(draw.crop, recipe.size) for draw, recipe in zip(draws, self.recipes, strict=True)]
        large = min(own[: self._num_large])
        return [large] * self._num_large + [min(large, small) for small in own[self._num_large :]]


def evaluation_transform(settings: ImageSettings) -> Callable[[Image.Image], Float[Tensor, "3 height width"]]:
    """Build the encoder's own preparation: resize the short side, crop the center, normalize."""
    transform: Callable[[Image.Image], Tensor] = v2.Compose(
        [
            v2.Resize(
                round(settings.size / settings.crop_share),
                interpolation=v2.InterpolationMode(settings.interpolation),
                antialias=True,
            ),
            v2.CenterCrop(settings.size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(settings.mean), list(settings.std)),
        ]
    )
    return transform


def _pixels(
    recipe: ViewRecipe,
    draw: ViewDraw,
    pixels: UInt8[np.ndarray, "height width 3"],
    size: tuple[int, int],
    reduction: int,
) -> UInt8[Tensor, "3 size size"]:
    """Cut a view out of the decoded image; a format that cannot be decoded reduced comes in full size."""
    crop = draw.crop if pixels.shape[1::-1] == size else draw.crop.reduced(reduction)
    view = cut(pixels, crop, recipe.size, interpolation=recipe.interpolation, flip=draw.flip)
    return rotate(view, draw.angle) if draw.angle != 0 else view


def _recipes(arguments: ViewArguments, settings: ImageSettings) -> list[ViewRecipe]:
    """Write out the recipe of each view."""
    size = arguments.image_size or settings.size
    large = [(size, arguments.crop_scale)] * arguments.num_views
    small = [(arguments.small_image_size, arguments.small_crop_scale)] * (arguments.num_small_views or 0)
    low_sigma, high_sigma = arguments.blur_sigma
    brightness, contrast, saturation, hue = arguments.jitter_strength
    return [
        ViewRecipe(
            size=size,
            interpolation=arguments.interpolation or settings.interpolation,
            crop_scale=(scale[0], scale[1]),
            flip_prob=arguments.flip_prob,
            rotation_degrees=arguments.rotation_degrees,
            jitter_prob=arguments.jitter_prob,
            jitter_strength=(brightness, contrast, saturation, hue),
            grayscale_prob=arguments.grayscale_prob,
            blur_prob=blur_prob,
            blur_sigma=(low_sigma, high_sigma),
            solarize_prob=solarize_prob,
        )
        for (size, scale), blur_prob, solarize_prob in zip(
            large + small,
            arguments.of_each_view(arguments.blur_prob),
            arguments.of_each_view(arguments.solarize_prob),
            strict=True,
        )
    ]
