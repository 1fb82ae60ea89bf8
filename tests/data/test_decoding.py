import io

import numpy as np
import pytest
from PIL import Image

from e2mc_hf.data.decoding import to_rgb


def ramp(dtype, peak):
    return np.linspace(0, peak, 256).astype(dtype).reshape(16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    assert (to_rgb(Image.new(mode, (5, 3))).mode, to_rgb(Image.new(mode, (5, 3))).size) == ("RGB", (5, 3))


@pytest.mark.parametrize(
    ("dtype", "peak"),
    [("uint16", 65535), (">u2", 65535), ("int32", 255), ("int32", 65535), ("int32", 2**31 - 1), ("float32", 1.0),
     ("float32", 255.0), ("float32", 65535.0)],
)  # fmt: skip
def test_deep_grays_keep_256_levels(dtype, peak):
    pixels = np.asarray(to_rgb(Image.fromarray(ramp(dtype, peak))))
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256))


def test_a_16_bit_png_keeps_256_levels():
    file = io.BytesIO()
    Image.fromarray(ramp("uint16", 65535)).save(file, "png")
    pixels = np.asarray(to_rgb(Image.open(file)))
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256))


def test_a_dark_16_bit_image_stays_dark():
    assert np.asarray(to_rgb(Image.fromarray(ramp("uint16", 600)))).max() == 2


def test_negative_pixels_become_black():
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), -7, np.int32)))).max() == 0


def test_pixels_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_transparent_pixels_become_white_whatever_color_lies_beneath():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    file = io.BytesIO()
    image.save(file, "png", transparency=b"\x00")
    assert to_rgb(Image.open(file)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied_once():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif)
    upright = to_rgb(Image.open(file))
    assert upright.size == (2, 4)
    assert to_rgb(upright).size == (2, 4)


def test_an_animation_gives_its_first_frame():
    file = io.BytesIO()
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    animation = Image.open(file)
    animation.seek(1)
    assert to_rgb(animation).getpixel((0, 0)) == (255, 0, 0)


def test_the_given_image_is_not_changed():
    image = Image.new("L", (2, 2), 7)
    to_rgb(image).putpixel((0, 0), (255, 255, 255))
    assert (image.mode, image.getpixel((0, 0))) == ("L", 7)
