import io
import math

import numpy as np
import pytest
import torch
from data.decoded_image import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from scipy import stats
from torchvision import transforms
from torchvision.transforms import v2

from e2mc_hf.data.decoding import EncodedImage
from e2mc_hf.data.draws import Place, uniforms
from e2mc_hf.data.geometry import Crop, cut, draw_crop, reduction_for, rotate

MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def crops(count, size, scale):
    return [draw_crop(uniforms(0, 0, row, 0, Place.END).tolist()[Place.CROP :], size, scale) for row in range(count)]


def levels(first, second):
    """Largest difference between two images, in levels of 255."""
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max()


def of(view):
    """Rows, columns, channels."""
    return view.permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photos(test_data):
    file = next((test_data / "imagenet_samples_256").glob("*.parquet"))
    return [row["bytes"] for row in parquet.read_table(file).column("image").slice(0, 24).to_pylist()]


@pytest.mark.parametrize("size", [(341, 256), (256, 341), (40, 30), (600, 100), (100, 600), (9, 7)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14), (0.9, 1.0)])
def test_crops_are_distributed_as_torchvisions(size, scale):
    image = Image.new("RGB", size)
    own = np.array(crops(2000, size, scale))
    params = [transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)]
    for place in range(4):
        assert stats.ks_2samp(own[:, place], np.array(params)[:, place]).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1000, 100), (100, 1000), (640, 2), (2, 640), (333, 100), (101, 300), (1, 1)])
def test_an_image_that_no_crop_fits_has_torchvisions_central_crop(size):
    theirs = {tuple(transforms.RandomResizedCrop.get_params(Image.new("RGB", size), (1.0, 1.0), (3 / 4, 4 / 3)))
              for _ in range(5)}  # fmt: skip
    assert set(map(tuple, crops(5, size, (1.0, 1.0)))) == theirs
    assert len(theirs) == 1


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)),
    st.lists(st.floats(0, math.nextafter(1, 0)), min_size=40, max_size=40),
)
def test_a_crop_lies_in_its_image(size, scale, numbers):
    crop = draw_crop(numbers, size, (min(scale), max(scale)))
    assert crop.height >= 1
    assert crop.width >= 1
    assert 0 <= crop.top <= size[1] - crop.height
    assert 0 <= crop.left <= size[0] - crop.width
    half = crop.reduced(2)
    assert half.top + half.height <= -(-size[1] // 2)
    assert half.left + half.width <= -(-size[0] // 2)


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(2, 64), st.booleans(), st.data())
@settings(max_examples=150)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_of_noise_is_torchvisions_to_two_levels(interpolation, image_size, size, flip, data):
    """Noise has the strongest edges there are; the window is a slice, as in training, or a copy, which is the same."""
    image = noise(*image_size, seed=data.draw(st.integers(0, 9)))
    height, width = (data.draw(st.integers(1, side)) for side in image_size)
    crop = Crop(data.draw(st.integers(0, image_size[0] - height)), data.draw(st.integers(0, image_size[1] - width)),
                height, width)  # fmt: skip
    view = cut(image.full, crop, size, interpolation=interpolation, flip=flip)
    window = torch.from_numpy(image.full).permute(2, 0, 1).contiguous()
    theirs = v2.functional.resized_crop(window, *crop, [size, size], v2.InterpolationMode(interpolation), True)
    assert view.is_contiguous()
    assert levels(view, theirs.flip(-1) if flip else theirs) <= 2
    # Pillow, made to resize along the rows first as torch does: its own choice of order changes what it clips.
    rows_first = image.pillow().crop((crop.left, crop.top, crop.left + width, crop.top + height))
    for shape in ((size, height), (size, size)):
        rows_first = rows_first.resize(shape, MODES[interpolation])
    assert levels(of(view)[:, ::-1] if flip else of(view), rows_first) <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [96, 224])
def test_views_of_photographs_are_torchvisions_to_two_levels(photos, interpolation, size):
    for place, photo in enumerate(photos):
        pixels = EncodedImage(photo).pixels()
        image = Image.fromarray(pixels)
        crop = draw_crop(uniforms(0, 0, place, 0, Place.END).tolist()[Place.CROP :], image.size, (0.08, 1.0))
        view = cut(pixels, crop, size, interpolation=interpolation, flip=False)
        mode = v2.InterpolationMode(interpolation)
        tensor = v2.functional.pil_to_tensor(image)
        assert levels(view, v2.functional.resized_crop(tensor, *crop, [size, size], mode, True)) <= 2
        if interpolation == "bilinear":
            assert levels(of(view), v2.functional.resized_crop(image, *crop, [size, size], mode, True)) <= 2


def test_a_view_is_no_window_on_the_image():
    image = noise(8, 8)
    view = cut(image.full, Crop(0, 0, 8, 8), 8, interpolation="bilinear", flip=False)
    assert levels(of(view), image.full) == 0
    image.full[:] = 0
    assert view.max() > 0


@pytest.mark.parametrize("degrees", [-15.0, -3.5, 0.1, 10.0, 90.0, 137.0])
@pytest.mark.parametrize("size", [8, 31, 96])
def test_rotation_is_torchvisions_on_pillow_images(degrees, size):
    image = noise(size, size).pillow()
    theirs = v2.functional.rotate(image, degrees, v2.InterpolationMode.BILINEAR)
    assert levels(of(rotate(v2.functional.pil_to_tensor(image), degrees)), theirs) == 0


def test_half_the_size_is_decoded_only_where_the_view_is_at_most_half_of_that():
    assert reduction_for(Crop(0, 0, 896, 1200), 224) == 2
    assert reduction_for(Crop(0, 0, 1200, 895), 224) == 1
    assert reduction_for(Crop(0, 0, 400, 384), 96) == 2


@pytest.mark.parametrize("grain", [0, 12])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_of_half_the_size_differ_by_half_a_level(photos, grain, interpolation):
    """At the least margin that `reduction_for` allows, on enlarged photographs, with and without film grain."""
    rng = np.random.default_rng(0)
    means, most = [], 0
    for photo in photos[:6]:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        image = image.resize((4 * image.width, 4 * image.height), Image.Resampling.LANCZOS)
        grainy = (np.array(image) + rng.normal(0, grain, (image.height, image.width, 3))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grainy).save(file, "JPEG", quality=92)
        encoded = EncodedImage(file.getvalue())
        full, half = encoded.pixels(), encoded.pixels(2)
        assert half.shape[:2] == tuple(-(-side // 2) for side in full.shape[:2])
        crop = Crop(31, 65, 896, 901)
        assert reduction_for(crop, 224) == 2
        views = [
            cut(pixels, own, 224, interpolation=interpolation, flip=False)
            for pixels, own in ((full, Crop(30, 64, 896, 902)), (half, crop.reduced(2)))
        ]
        means.append(np.abs(views[0].numpy().astype(int) - views[1].numpy()).mean())
        most = max(most, levels(*views))
    assert np.mean(means) < (0.6 if grain else 0.3)
    assert most <= 6
