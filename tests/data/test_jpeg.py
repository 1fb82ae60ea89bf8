import io

import numpy as np
import pyarrow.parquet
import pytest
from data.mutations import METADATA, exif, photo, save, with_bits_flipped, with_other_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e2mc_hf.data import jpeg
from e2mc_hf.data.decoding import EncodedImage
from e2mc_hf.data.jpeg import decode_plain, plain_size

PHOTO = photo(np.random.default_rng(0)).resize((101, 75))
PLAIN = save(PHOTO, "jpeg")


def pillow_pixels(encoded, reduction=1):
    image = Image.open(io.BytesIO(encoded), formats=["JPEG"])
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def decoder():
    pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
                                     {"keep_rgb": True}, {"restart_marker_rows": 1}, {"quality": 3}])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_decoding_equals_pillow_in_every_pixel(decoder, mode, options, reduction):
    encoded = save(PHOTO.convert(mode), "jpeg", **options)
    assert np.array_equal(decode_plain(encoded, PHOTO.size, reduction), pillow_pixels(encoded, reduction))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_real_photographs_decode_as_pillow_decodes_them(decoder, photo_folder, reduction):
    column = pyarrow.parquet.read_table(next(photo_folder.glob("validation*.parquet"))).column("image")
    for row in column.slice(100, 50).to_pylist():
        size = plain_size(row["bytes"])
        assert size == Image.open(io.BytesIO(row["bytes"])).size
        assert np.array_equal(decode_plain(row["bytes"], size, reduction), pillow_pixels(row["bytes"], reduction))


@settings(max_examples=60)
@given(st.integers(16, 40), st.integers(16, 40), st.sampled_from([1, 2, 4, 8]))
def test_a_reduced_image_has_pillows_size_and_pixels_whatever_the_sides(width, height, reduction):
    pytest.importorskip("simplejpeg")
    encoded = save(PHOTO.resize((width, height)), "jpeg")
    pixels = decode_plain(encoded, (width, height), reduction)
    assert pixels.shape == (-(-height // reduction), -(-width // reduction), 3)
    assert np.array_equal(pixels, pillow_pixels(encoded, reduction))


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.sampled_from([with_bits_flipped, with_other_dimensions]))
def test_what_a_broken_file_decodes_to_is_what_pillow_decodes_it_to(seed, mutate):
    encoded = mutate(PLAIN, np.random.default_rng(seed))
    size = plain_size(encoded)
    if size is None or size[0] * size[1] > 1e6:
        return
    pixels = decode_plain(encoded, size, 1)
    assert pixels is None or np.array_equal(pixels, pillow_pixels(encoded))


@pytest.mark.parametrize("part", [0.3, 0.7, 0.99])
def test_a_truncated_file_is_left_to_pillow(part):
    assert decode_plain(PLAIN[: int(part * len(PLAIN))], PHOTO.size, 1) is None


def test_what_the_faster_decoder_has_no_memory_for_is_left_to_pillow(decoder, monkeypatch):
    def broken(*args, **options):
        raise MemoryError

    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", broken)
    assert np.array_equal(EncodedImage(PLAIN).pixels(), pillow_pixels(PLAIN))


def test_an_image_of_a_few_pixels_is_left_to_pillow():
    assert decode_plain(save(PHOTO.resize((40, 15)), "jpeg"), (40, 15), 2) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 70}, {"icc_profile": bytes(90_000)}])
def test_the_size_of_a_plain_file_is_read_off_its_header(options):
    assert plain_size(save(PHOTO, "jpeg", **options)) == (101, 75)


@pytest.mark.parametrize(
    "encoded",
    [b"", b"\xff\xd8", b"<html>", save(PHOTO, "png"), save(PHOTO.convert("CMYK"), "jpeg"),
     save(PHOTO, "jpeg", exif=exif(1)), PLAIN[:180], PLAIN.replace(b"\xff\xc0", b"\xff\xc3"),
     PLAIN.replace(b"\xff\xdb", b"\xff\x01"), PLAIN.replace(b"\0\x4b\0\x65", bytes(4))],
    ids=["empty", "two bytes", "page", "PNG", "CMYK", "EXIF", "half a header", "lossless", "odd marker", "no sides"],
)  # fmt: skip
def test_any_other_file_is_not_plain(encoded):
    assert plain_size(encoded) is None


@pytest.mark.parametrize(("kind", "name"), METADATA)
def test_metadata_that_pillow_reads_is_left_to_pillow_unless_in_order(kind, name):
    segment = b"\xff" + kind + (len(name) + 2).to_bytes(2, "big") + name
    assert plain_size(b"\xff\xd8" + segment + PLAIN[2:]) is None


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_of_several_pictures_in_a_file_the_first_is_decoded(reduction):
    encoded = save(PHOTO, "mpo", save_all=True, append_images=[PHOTO.rotate(90)])
    assert np.array_equal(EncodedImage(encoded).pixels(reduction), pillow_pixels(encoded, reduction))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("reduction", [1, 4])
def test_without_the_faster_decoder_the_pixels_are_the_same(decoder, monkeypatch, orientation, reduction):
    encoded = save(PHOTO, "jpeg", exif=exif(orientation))
    with_it = EncodedImage(encoded).pixels(reduction)
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert np.array_equal(with_it, EncodedImage(encoded).pixels(reduction))
