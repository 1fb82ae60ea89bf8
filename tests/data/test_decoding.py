import io
import pickle
import warnings

import numpy as np
import pytest
from data.mutations import deep, exif, photo, save
from PIL import Image, ImageFile, ImageOps, features

from e2mc_hf.data import decoding
from e2mc_hf.data.decoding import EncodedImage, UnreadableImage, to_rgb

PHOTO = photo(np.random.default_rng(0))


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


def reason(encoded):
    with pytest.raises(UnreadableImage) as caught:
        EncodedImage(encoded).pixels()
    return caught.value.reason


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_upright(kind, orientation):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    encoded = save(PHOTO, kind, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    image = EncodedImage(encoded)
    assert image.size == upright.size == (PHOTO.size if orientation < 5 else PHOTO.size[::-1])
    assert np.array_equal(image.pixels(), np.asarray(upright))


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(orientation, reduction):
    options = {} if orientation is None else {"exif": exif(orientation)}
    image = EncodedImage(save(PHOTO, "jpeg", **options))
    width, height = image.size
    assert image.pixels(reduction).shape == (-(-height // reduction), -(-width // reduction), 3)


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_decoded_in_full_as_often_as_asked(kind):
    image = EncodedImage(save(PHOTO, kind))
    whole = image.pixels()
    assert whole.shape == (*PHOTO.size[::-1], 3)
    assert np.array_equal(whole, image.pixels(8))


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_pixels_are_new_writable_and_contiguous(kind):
    image = EncodedImage(save(PHOTO, kind, exif=exif(5)))
    pixels = image.pixels()
    kept = pixels.copy()
    pixels[:] = 0
    assert pixels.flags.c_contiguous
    assert np.array_equal(image.pixels(), kept)


@pytest.mark.parametrize(
    "image",
    [PHOTO, *(PHOTO.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA")), deep(PHOTO, np.uint16)],
    ids=lambda image: image.mode,
)
def test_an_image_converted_in_bands_is_that_converted_at_once(image, monkeypatch):
    encoded = save(image, "png")
    at_once = EncodedImage(encoded).pixels()
    monkeypatch.setattr(decoding, "BAND_PIXELS", 5 * PHOTO.width)
    assert np.array_equal(EncodedImage(encoded).pixels(), at_once)
    assert np.array_equal(at_once, np.asarray(to_rgb(image)))


def test_white_is_that_of_the_whole_image_not_of_a_band(monkeypatch):
    monkeypatch.setattr(decoding, "BAND_PIXELS", 16)
    encoded = save(Image.fromarray(ramp("float32", 65535.0)), "tiff")
    assert np.array_equal(EncodedImage(encoded).pixels()[..., 0].ravel(), np.arange(256))


def test_an_adobe_cmyk_jpeg_is_not_a_negative():
    white = save(Image.new("CMYK", (20, 20)), "jpeg")
    assert EncodedImage(white).pixels().min() > 250


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "mpo"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "blue")]
    encoded = save(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = EncodedImage(encoded).pixels()[0, 0].astype(int)
    assert red > 250 > 5 > blue


SKIPPED = {
    "empty file": (b"", "empty"),
    "web page": (b"<!DOCTYPE html><html></html>", "not an image"),
    "page description": (save(PHOTO, "pdf"), "not an image"),
    "program that draws": (save(PHOTO, "eps"), "not an image"),
    "half a JPEG header": (save(PHOTO, "jpeg")[:30], "truncated"),
    "JPEG without its end": (save(PHOTO, "jpeg")[:-200], "truncated"),
    "PNG without its end": (save(PHOTO, "png")[:-200], "truncated"),
    "PNG with a hole": (save(PHOTO, "png")[:60] + bytes(60) + save(PHOTO, "png")[120:], "corrupt"),
    "nine gigapixels": (b"P6 90000 90000 255\n", "too large"),
    "pixels that are no numbers": (save(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "tiff"), "unsupported"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_file_is_skipped_for_a_reason(name):
    encoded, expected = SKIPPED[name]
    assert reason(encoded) == expected


@pytest.mark.parametrize("error", [SyntaxError, MemoryError, RecursionError, ZeroDivisionError, KeyError, EOFError])
def test_whatever_a_decoder_raises_the_image_is_unreadable(monkeypatch, error):
    def broken(self):
        raise error("inside")

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    assert reason(save(PHOTO, "bmp")) in ("corrupt", "too large", "truncated")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_exif_that_cannot_be_read_does_not_spoil_an_image(monkeypatch, kind):
    encoded = save(PHOTO, kind, exif=exif(6))

    def broken(self):
        raise SyntaxError("not a TIFF file")  # as Pillow did up to version 6

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert EncodedImage(encoded).pixels().shape == (*PHOTO.size[::-1], 3)


def test_broken_exif_that_makes_pillow_warn_neither_spoils_an_image_nor_warns():
    encoded = save(PHOTO, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(9))
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(encoded)).getexif()
    assert EncodedImage(encoded).pixels().shape == (*PHOTO.size[::-1], 3)


def test_the_warning_of_a_large_image_does_not_leak(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO.width * PHOTO.height - 1)
    assert EncodedImage(save(PHOTO, "png")).size == PHOTO.size


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "tiff"])
def test_a_truncated_file_is_skipped_also_where_pillow_was_told_to_fill_it(monkeypatch, kind):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = save(PHOTO, kind)
    assert reason(whole[: len(whole) // 2]) in ("truncated", "corrupt")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_settings_of_the_process_stay_as_they_are():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    EncodedImage(save(PHOTO, "png")).pixels()
    assert reason(save(PHOTO, "png")[:99]) == "truncated"
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_the_header_alone_gives_the_size():
    image = EncodedImage(save(PHOTO, "jpeg")[:-500])
    assert image.size == PHOTO.size
    with pytest.raises(UnreadableImage, match="truncated"):
        image.pixels()


def test_the_exception_survives_the_way_from_a_worker():
    unreadable = pickle.loads(pickle.dumps(UnreadableImage("corrupt", "OSError: broken")))
    assert (unreadable.reason, str(unreadable)) == ("corrupt", "corrupt (OSError: broken)")
