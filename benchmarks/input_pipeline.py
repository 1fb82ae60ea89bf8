"""Images a second and core from JPEG bytes to views: this package against the methods' own kind of pipeline.

    python benchmarks/input_pipeline.py [FOLDER] [--repeats 9]

All work on the same JPEG files in this process, on one thread, a batch of 64 at a time, in turns; a figure is the
median over the turns. Two recipes, out of e2mc_hf/recipes: two views of 224 pixels (VICReg), and two of 224 with six
of 96 (SwAV).

  authors   Pillow and torchvision, as the methods' released code has it: decode, RandomResizedCrop, flip, jitter,
            grayscale, Pillow's GaussianBlur, solarization, ToTensor, Normalize, each view in turn
  lightly   lightly's VICRegTransform at the same probabilities (each view the mean of the two views' own);
            `pip install lightly`, left out when it is not there
  worker    ours, what a worker does: bytes to uint8 views and photometric parameters
  whole     ours, to normalized float32 views, all on the CPU (training does the second half on the GPU)

FOLDER holds parquet files with a column `image`; by default imagenet_samples_256 below $E2MC_TEST_DATA.
"""

import argparse
import io
import os
import random
import statistics
import time
from collections.abc import Callable
from importlib import resources, util
from pathlib import Path

import torch
import yaml
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.decoding import EncodedImage
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import ViewTransform

BATCH = 64
SETTINGS = ImageSettings(size=224)
RECIPES = {"2 x 224": "vicreg-1000-e2mc.yaml", "2 x 224 + 6 x 96": "swav-800-e2mc.yaml"}
Pipeline = Callable[[list[bytes]], list[Tensor]]


def read_recipe(name: str) -> ViewArguments:
    """Take the options about views out of a recipe of the package."""
    recipe = yaml.safe_load((resources.files("e2mc_hf") / "recipes" / name).read_text(encoding="utf-8"))
    return ViewArguments(**{key: recipe[key] for key in ViewArguments.__dataclass_fields__ if key in recipe})


def read_files(folder: Path, count: int) -> list[bytes]:
    """Read the image files as they are stored."""
    rows = load_dataset("parquet", data_files=[str(path) for path in sorted(folder.glob("*.parquet"))], split="train")
    return [row["image"]["bytes"] for row in rows.cast_column("image", ImageFeature(decode=False)).select(range(count))]


def authors(recipe: ViewArguments) -> Pipeline:
    """Pillow images through torchvision's transforms."""
    large = [(SETTINGS.size, recipe.crop_scale)] * recipe.num_views
    small = [(recipe.small_image_size, recipe.small_crop_scale)] * (recipe.num_small_views or 0)
    mode = transforms.InterpolationMode(recipe.interpolation or SETTINGS.interpolation)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*recipe.blur_sigma)))

    views = [
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=tuple(scale), interpolation=mode),
                transforms.RandomHorizontalFlip(recipe.flip_prob),
                transforms.RandomApply([transforms.ColorJitter(*recipe.jitter_strength)], recipe.jitter_prob),
                transforms.RandomGrayscale(recipe.grayscale_prob),
                transforms.RandomApply([transforms.Lambda(blur)], blur_prob),
                transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], solarize_prob),
                transforms.ToTensor(),
                transforms.Normalize(SETTINGS.mean, SETTINGS.std),
            ]
        )
        for (size, scale), blur_prob, solarize_prob in zip(
            large + small,
            recipe.of_each_view(recipe.blur_prob),
            recipe.of_each_view(recipe.solarize_prob),
            strict=True,
        )
    ]
    return _of_pillow_images(lambda image: [view(image) for view in views])


def lightly_vicreg(recipe: ViewArguments) -> Pipeline | None:
    """Build lightly's transform; None where lightly is missing, or has no such transform (small views)."""
    try:
        from lightly.transforms import VICRegTransform
    except ImportError:
        return None
    if recipe.num_small_views:
        return None
    brightness, contrast, saturation, hue = recipe.jitter_strength
    transform = VICRegTransform(
        cj_prob=recipe.jitter_prob,
        cj_strength=1.0,
        cj_bright=brightness,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=recipe.crop_scale[0],
        random_gray_scale=recipe.grayscale_prob,
        solarize_prob=statistics.mean(recipe.solarize_prob),
        gaussian_blur=statistics.mean(recipe.blur_prob),
        sigmas=tuple(recipe.blur_sigma),
    )
    return _of_pillow_images(transform)


def _of_pillow_images(transform: Callable[[Image.Image], list[Tensor]]) -> Pipeline:
    def pipeline(files: list[bytes]) -> list[Tensor]:
        samples = [transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return [torch.stack(view) for view in zip(*samples, strict=True)]

    return pipeline


def ours(recipe: ViewArguments, *, whole: bool) -> Pipeline:
    """This package, to uint8 views or all the way."""
    transform = ViewTransform(recipe, SETTINGS)

    def pipeline(files: list[bytes]) -> list[Tensor]:
        samples = [
            transform(EncodedImage(file), seed=0, epoch=0, sample_id=sample_id) for sample_id, file in enumerate(files)
        ]
        views = list(zip(*samples, strict=True))
        pixels = [torch.stack([view.pixels for view in place]) for place in views]
        colors = [torch.stack([view.photometry for view in place]) for place in views]
        return transform.photometry(pixels, colors) if whole else pixels

    return pipeline


def images_per_second(pipelines: dict[str, Pipeline], files: list[bytes], repeats: int) -> dict[str, float]:
    """Median rate of each pipeline; each turn gives all of them the same batch, the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(repeats + 1):
        start = turn * BATCH % (len(files) - BATCH + 1)
        batch = files[start : start + BATCH]
        for name, pipeline in pipelines.items():
            begin = time.perf_counter()
            pipeline(batch)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: BATCH / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("E2MC_TEST_DATA", ".")) / "imagenet_samples_256"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if not any(options.folder.glob("*.parquet")):
        parser.error(f"no parquet files in {options.folder}: pass a folder that has some, or set E2MC_TEST_DATA")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = read_files(options.folder, 10 * BATCH)
    kilobytes = statistics.mean(map(len, files)) / 1000
    decoder = "simplejpeg" if util.find_spec("simplejpeg") else "Pillow"
    print(f"{len(files)} JPEG files of {kilobytes:.0f} kB, 1 thread, torch {torch.__version__}, {decoder}")
    print(f"{'views':<17} | {'pipeline':<8} | {'images/s':>8} | {'of authors':>10}")
    for title, name in RECIPES.items():
        recipe = read_recipe(name)
        pipelines = {
            "authors": authors(recipe),
            "lightly": lightly_vicreg(recipe),
            "worker": ours(recipe, whole=False),
            "whole": ours(recipe, whole=True),
        }
        rates = images_per_second({key: own for key, own in pipelines.items() if own}, files, options.repeats)
        for key, rate in rates.items():
            print(f"{title:<17} | {key:<8} | {rate:>8.0f} | {rate / rates['authors']:>9.1f}x")


if __name__ == "__main__":
    main()
