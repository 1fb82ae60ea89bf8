"""A shorter way to the pixels of an ordinary JPEG file; whatever is out of the ordinary is left to Pillow."""

import struct

import numpy as np
from jaxtyping import UInt8

try:
    # Bindings to libjpeg-turbo: 1.4 times as fast as Pillow and equal to it in every pixel, so that having them or not
    # changes no result.
    import simplejpeg  # type: ignore[import-untyped]
except ImportError:
    simplejpeg = None

START_OF_IMAGE = b"\xff\xd8"
START_OF_SCAN = 0xDA
# Baseline, extended and progressive; Pillow may not know the others.
FRAMES = (0xC0, 0xC1, 0xC2)
# Segments without a bearing on size, rotation or Pillow's verdict, with the least length at which that holds. EXIF
# (E1) and Photoshop's (ED) are missing: Pillow has to read them.
HARMLESS = {0xC4: 2, 0xDB: 2, 0xDD: 2, 0xE0: 16, 0xEE: 14, 0xFE: 2}
ICC_PROFILE = b"ICC_PROFILE\0"
# Below this side, in pixels, two reductions lead to the same size, and the decoder is free to take the wrong one.
SMALLEST_SIDE = 16


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Read the size off the header of a JPEG file that is gray or has three colors of 8 bits, and no EXIF.

    Args:
        encoded: The file.

    Returns:
        Width and height in pixels; None for any other file, and for a header with anything odd about it.
    """
    if not encoded.startswith(START_OF_IMAGE):
        return None
    size, position = None, len(START_OF_IMAGE)
    while position + 4 <= len(encoded):
        fill, kind, length = struct.unpack_from(">BBH", encoded, position)
        if fill != 0xFF:
            return None
        if kind == START_OF_SCAN:
            return size
        if kind in FRAMES and size is None:
            size = _frame_size(encoded[position + 4 : position + 2 + length])
            if size is None:
                return None
        elif length < HARMLESS.get(kind, 1 << 16) and not _is_profile(encoded, position, kind, length):
            return None
        position += 2 + length
    return None


def decode_plain(encoded: bytes, size: tuple[int, int], reduction: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decode a JPEG file of one or three 8-bit components exactly as Pillow does.

    Args:
        encoded: The file.
        size: Width and height in the header, pixels.
        reduction: 1, 2, 4 or 8; sides are divided by it and rounded up.

    Returns:
        RGB pixels, not rotated. None if the decoder has the least complaint, or is not installed: Pillow judges then.
    """
    if simplejpeg is None or min(size) < SMALLEST_SIDE:
        return None
    width, height = (-(-side // reduction) for side in size)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(encoded, "RGB", min_height=height, min_width=width, strict=True)
    except Exception:  # truncated, corrupt, out of memory, of a subsampling it does not know
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Read width and height of a frame header; None if it is not of one or three 8-bit components."""
    if len(frame) < 6:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    plain = precision == 8 and components in (1, 3) and len(frame) == 6 + 3 * components
    return (width, height) if plain and width and height else None


def _is_profile(encoded: bytes, position: int, kind: int, length: int) -> bool:
    """Whether a segment holds a color profile, or a part of one."""
    return kind == 0xE2 and length >= 16 and encoded.startswith(ICC_PROFILE, position + 4)
