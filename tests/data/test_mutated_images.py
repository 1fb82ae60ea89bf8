import io
import warnings
from collections import Counter

import numpy as np
import pytest
from data.mutations import odd_files, seeds, truncated, without_its_end
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from e2mc_hf.data import decoding
from e2mc_hf.data.decoding import REASONS, EncodedImage, UnreadableImage

SIGNATURES = [b"", *decoding.SIGNATURES, b"RIFF\x20\0\0\0WEBPVP8 ", b"P6 5 5 255\n", b"\0\0\0\x20ftypavif"]


def read(encoded):
    """Pixels, or the reason there are none."""
    try:
        image = EncodedImage(encoded)
        pixels = image.pixels()
    except UnreadableImage as unreadable:
        return unreadable.reason
    assert (pixels.dtype, pixels.shape) == (np.uint8, (image.size[1], image.size[0], 3))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def pillow_reads(encoded):
    """What Pillow makes of a file: an RGB image, or None, and whether its plain conversion is ours, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(encoded), formats=decoding.FORMATS)
            if image.width * image.height > decoding.pixel_limit(image):
                return None, False
            image.load()
            plain = image.mode in ("1", "L", "P", "RGB", "CMYK") and not image.has_transparency_data
            rgb = image.convert("RGB")
            if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                return None, False
        except Exception:
            return None, False
        try:
            return ImageOps.exif_transpose(rgb), plain
        except Exception:  # broken metadata: what it says of the rotation is not for this function to judge
            return rgb, False


def compare_with_pillow(count, seed):
    outcomes, wrong = Counter(), []
    for number, (way, encoded) in enumerate(odd_files(count, seed)):
        ours = read(encoded)
        theirs, plain = pillow_reads(encoded)
        outcome = ours if isinstance(ours, str) else "read"
        outcomes[way, outcome] += 1
        same = isinstance(ours, str) == (theirs is None)
        if not same or (plain and not np.array_equal(ours, theirs)):
            wrong.append((number, way, outcome, theirs))
    print_table(outcomes)
    assert {outcome for _, outcome in outcomes} <= {"read", *REASONS}
    return outcomes, wrong


def print_table(outcomes):
    columns = ("read", *REASONS)
    print("\n" + " " * 24 + "".join(f"{column:>14}" for column in columns))
    for way in [*dict.fromkeys(way for way, _ in outcomes), "all"]:
        counts = [sum(n for (w, c), n in outcomes.items() if c == column and way in (w, "all")) for column in columns]
        print(f"{way:<24}" + "".join(f"{number:>14,}" for number in counts))


def test_of_1000_odd_files_those_are_skipped_that_pillow_cannot_read():
    outcomes, wrong = compare_with_pillow(1_000, seed=0)
    assert wrong == []
    assert outcomes.total() == 1_000
    assert {reason for _, reason in outcomes} >= {"read", "empty", "not an image", "truncated", "corrupt", "too large"}


@pytest.mark.slow
def test_of_10000_odd_files_those_are_skipped_that_pillow_cannot_read():
    outcomes, wrong = compare_with_pillow(10_000, seed=1)
    assert wrong == []
    assert outcomes.total() == 10_000


def test_the_files_that_mutations_start_from_are_all_read():
    assert [read(encoded) for encoded in seeds(np.random.default_rng(2)) if isinstance(read(encoded), str)] == []


@pytest.mark.parametrize("cut", [truncated, without_its_end])
def test_a_truncated_file_is_skipped_or_had_all_its_pixels(cut):
    rng = np.random.default_rng(3)
    skipped = 0
    for whole in (file for file in seeds(rng) if not file.startswith(b"P3")):  # text may end in any digit
        for _ in range(5):
            part = read(cut(whole, rng))
            skipped += isinstance(part, str)
            assert isinstance(part, str) or np.array_equal(part, read(whole))
    assert skipped > 200


@settings(max_examples=300)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=400))
def test_no_bytes_raise_anything_but_unreadable(signature, rest):
    outcome = read(signature + rest)
    assert not isinstance(outcome, str) or outcome in REASONS
