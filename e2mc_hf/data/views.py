"""View recipes: several random pictures of one image, each a function of (seed, epoch, sample id, view) alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.seeds import derive_seed

SOLARIZE_THRESHOLD = 0.5


class ViewTransform:
    """Draw the views of an image: the large ones, then the small ones.

    A view's draw depends on its place alone: the large views are the same with and without small ones.

    Args:
        arguments: The recipe; a step whose probability is 0 is left out. Without a number of small views there are
            none: what an objective's own number is, `ViewArguments.resolved` is told.
        settings: The encoder's input size, statistics and interpolation.
    """

    def __init__(self, arguments: ViewArguments, settings: ImageSettings) -> None:
        settings = replace(
            settings,
            size=arguments.image_size or settings.size,
            interpolation=arguments.interpolation or settings.interpolation,
        )
        small_settings = replace(settings, size=arguments.small_image_size)
        large = [(settings, arguments.crop_scale)] * arguments.num_views
        small = [(small_settings, arguments.small_crop_scale)] * (arguments.num_small_views or 0)
        self.pipelines = [
            v2.Compose([*_geometry(arguments, own, scale), *_colors(arguments, own, blur_prob, solarize_prob)])
            for (own, scale), blur_prob, solarize_prob in zip(
                large + small,
                arguments.of_each_view(arguments.blur_prob),
                arguments.of_each_view(arguments.solarize_prob),
                strict=True,
            )
        ]

    def __call__(
        self, image: Image.Image, *, seed: int, epoch: int, sample_id: int
    ) -> list[Float[Tensor, "3 height width"]]:
        """Draw one view with each pipeline; the global random state is left as it was.

        Returns:
            Normalized float32 tensors, `num_views` of the large size and `num_small_views` of the small one.
        """
        views = []
        for view, pipeline in enumerate(self.pipelines):
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: that would reseed the GPUs, which fork_rng does not restore here.
                torch.default_generator.manual_seed(derive_seed(seed, epoch, sample_id, view))
                views.append(pipeline(image))
        return views


class GaussianBlur(nn.Module):
    """Blur with a random sigma, along the columns and then along the rows.

    The result is that of torchvision's own transform, whose dense kernel costs seven times as much at 224 pixels.

    Args:
        kernel_size: Side of the kernel, odd.
        sigma: Range that its standard deviation is drawn from, in pixels.
    """

    def __init__(self, kernel_size: int, sigma: Sequence[float]) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.sigma = tuple(sigma)

    def forward(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        """Blur one image."""
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        for kernel_size in ([1, self.kernel_size], [self.kernel_size, 1]):
            image = functional.gaussian_blur(image, kernel_size, [sigma, sigma])
        return image


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


def _geometry(arguments: ViewArguments, settings: ImageSettings, scale: Sequence[float]) -> list[v2.Transform]:
    """Crop, flip and rotate, on the Pillow image."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(
            settings.size,
            scale=tuple(scale),
            interpolation=v2.InterpolationMode(settings.interpolation),
            antialias=True,
        )
    ]
    if arguments.flip_prob > 0:
        steps.append(v2.RandomHorizontalFlip(arguments.flip_prob))
    if arguments.rotation_degrees > 0:
        steps.append(v2.RandomRotation(arguments.rotation_degrees, interpolation=v2.InterpolationMode.BILINEAR))
    return steps


def _colors(
    arguments: ViewArguments, settings: ImageSettings, blur_prob: float, solarize_prob: float
) -> list[v2.Transform]:
    """Jitter and grayscale on the Pillow image (faster there than on tensors); blur and solarize on the tensor."""
    steps: list[v2.Transform] = []
    if arguments.jitter_prob > 0:
        steps.append(v2.RandomApply([v2.ColorJitter(*arguments.jitter_strength)], p=arguments.jitter_prob))
    if arguments.grayscale_prob > 0:
        steps.append(v2.RandomGrayscale(arguments.grayscale_prob))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if blur_prob > 0:
        blur = GaussianBlur(_blur_kernel(settings.size), arguments.blur_sigma)
        steps.append(v2.RandomApply([blur], p=blur_prob))
    if solarize_prob > 0:
        steps.append(v2.RandomSolarize(SOLARIZE_THRESHOLD, solarize_prob))
    return [*steps, v2.Normalize(list(settings.mean), list(settings.std))]


def _blur_kernel(image_size: int) -> int:
    """Odd kernel size, about a tenth of the image."""
    return max(3, image_size // 10 | 1)
