"""Images of every kind, and ways to break them: what a reader of image files has to survive."""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import ExifTags, Image, ImageFilter, features

SIDE = 48  # pixels: small, so that thousands decode in seconds

Random = np.random.Generator


def photo(rng: Random) -> Image.Image:
    """Draw something with the smoothness of a photograph."""
    noise = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return noise.resize((SIDE + 16, SIDE), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def real_photos() -> list[bytes]:
    """A few JPEG files as they came, if E2MC_TEST_DATA says where."""
    root = os.environ.get("E2MC_TEST_DATA")
    if root is None:
        return []
    table = pyarrow.parquet.read_table(next(Path(root, "imagenette160").glob("validation*.parquet")))
    return [row["bytes"] for row in table.column("image").slice(0, 6).to_pylist()]


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    """EXIF with a rotation and a comment."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.ImageDescription] = "a photograph"
    return tags.tobytes()


def jpeg_seeds(image: Image.Image) -> Iterator[bytes]:
    yield save(image, "jpeg")
    yield save(image, "jpeg", quality=95, subsampling=0)
    yield save(image, "jpeg", progressive=True)
    yield save(image, "jpeg", restart_marker_rows=1)
    yield save(image, "jpeg", keep_rgb=True)
    yield save(image, "jpeg", comment=b"taken by nobody", icc_profile=bytes(300))
    yield save(image.convert("L"), "jpeg")
    yield save(image.convert("CMYK"), "jpeg")
    yield from (save(image, "jpeg", exif=exif(orientation)) for orientation in range(1, 9))
    yield save(image, "mpo", save_all=True, append_images=[image.rotate(9)])


def png_seeds(image: Image.Image) -> Iterator[bytes]:
    yield from (save(image.convert(mode), "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA"))
    yield save(image.convert("P"), "png", transparency=bytes(range(256)))
    yield save(image.convert("L"), "png", transparency=7)
    yield save(image, "png", exif=exif(6), icc_profile=bytes(300))
    yield save(image, "png", save_all=True, append_images=[image.rotate(9)])
    yield save(deep(image, np.uint16), "png")


def tiff_seeds(image: Image.Image) -> Iterator[bytes]:
    yield from (save(image.convert(mode), "tiff") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"))
    yield from (save(image, "tiff", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"))
    yield save(image.convert("1"), "tiff", compression="group4")
    yield save(image, "tiff", save_all=True, append_images=[image.rotate(9)])
    yield from (save(deep(image, kind), "tiff") for kind in (np.uint16, ">u2", np.int32, np.float32))
    yield save(image, "tiff", exif=exif(6))


def other_seeds(image: Image.Image) -> Iterator[bytes]:
    frames = {"save_all": True, "append_images": [image.rotate(9), image.rotate(99)]}
    yield from (save(image, "gif"), save(image, "gif", **frames), save(image.convert("L"), "gif", transparency=3))
    yield from (save(image, "webp"), save(image, "webp", lossless=True), save(image, "webp", **frames))
    yield from (save(image.convert("RGBA"), "webp"), save(image, "webp", exif=exif(3)))
    yield from (save(image.convert(mode), "bmp") for mode in ("1", "L", "P", "RGB", "RGBA"))
    yield from (save(image.convert(mode), "ppm") for mode in ("1", "L", "RGB"))
    yield from (save(deep(image, np.int32), "ppm"), save(deep(image, np.float32), "ppm"))
    yield b"P3 3 2 255\n" + b" ".join(b"%d" % value for value in range(18))
    if features.check("jpg_2000"):
        yield from (save(image.convert(mode), "jpeg2000") for mode in ("L", "RGB", "RGBA"))
    if features.check("avif"):
        yield from (save(image, "avif"), save(image, "avif", exif=exif(6)))


def deep(image: Image.Image, dtype: object) -> Image.Image:
    """The grays of an image in 16 or 32 bits."""
    return Image.fromarray((np.asarray(image.convert("L"), np.float64) * 200).astype(dtype))


def seeds(rng: Random) -> list[bytes]:
    """One file of each kind, all good."""
    image = photo(rng)
    makers = (jpeg_seeds, png_seeds, tiff_seeds, other_seeds)
    return real_photos() + [file for maker in makers for file in maker(image)]


def unchanged(file: bytes, rng: Random) -> bytes:
    return file


def truncated(file: bytes, rng: Random) -> bytes:
    return file[: rng.integers(0, len(file))]


def without_its_end(file: bytes, rng: Random) -> bytes:
    return file[: -int(rng.integers(1, 20))]


def with_bits_flipped(file: bytes, rng: Random) -> bytes:
    changed = bytearray(file)
    for position in rng.integers(0, len(file), rng.integers(1, 20)):
        changed[position] ^= 1 << rng.integers(0, 8)
    return bytes(changed)


def with_a_block_zeroed(file: bytes, rng: Random) -> bytes:
    start = rng.integers(0, len(file))
    length = min(int(rng.integers(1, 200)), len(file) - start)
    return file[:start] + bytes(length) + file[start + length :]


def with_its_header_edited(file: bytes, rng: Random) -> bytes:
    changed = bytearray(file)
    for position in rng.integers(0, min(len(file), 200), rng.integers(1, 4)):
        changed[position] = rng.integers(0, 256)
    return bytes(changed)


def with_a_piece_cut_out(file: bytes, rng: Random) -> bytes:
    start = rng.integers(0, len(file))
    return file[:start] + file[start + rng.integers(1, 100) :]


def with_a_piece_doubled(file: bytes, rng: Random) -> bytes:
    start = rng.integers(0, len(file))
    return file[: start + rng.integers(1, 100)] + file[start:]


def with_trailing_junk(file: bytes, rng: Random) -> bytes:
    return file + rng.bytes(100)


def with_leading_junk(file: bytes, rng: Random) -> bytes:
    return rng.bytes(int(rng.integers(1, 9))) + file


def with_another_signature(file: bytes, rng: Random) -> bytes:
    signature = rng.choice([b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\x00", b"P6 9 9 255\n"])
    return bytes(signature) + file[len(signature) :]


def with_other_dimensions(file: bytes, rng: Random) -> bytes:
    """Write other sides, up to 65,536 pixels, where their place is known; elsewhere edit the header."""
    width, height = (int(side) for side in 2 ** rng.uniform(0, 16, 2))
    if file.startswith(b"\xff\xd8"):
        frame = max(file.find(b"\xff\xc0"), file.find(b"\xff\xc2"))
        return file[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + file[frame + 9 :]
    if file.startswith(b"\x89PNG"):
        header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + file[24:29]
        return file[:12] + header + zlib.crc32(header).to_bytes(4, "big") + file[33:]
    if file.startswith(b"GIF"):
        return file[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + file[10:]
    if file.startswith(b"BM"):
        return file[:18] + width.to_bytes(4, "little") + height.to_bytes(4, "little") + file[26:]
    return with_its_header_edited(file, rng)


def with_broken_metadata(file: bytes, rng: Random) -> bytes:
    """Add an EXIF, XMP, color profile, Photoshop or multi-picture segment of junk to a JPEG; elsewhere flip bits."""
    if not file.startswith(b"\xff\xd8"):
        return with_bits_flipped(file, rng)
    kind, name = METADATA[rng.integers(0, len(METADATA))]
    junk = name + (b"II*\0\x08\0\0\0" if rng.random() < 0.5 else b"") + rng.bytes(int(rng.integers(0, 90)))
    return file[:2] + b"\xff" + kind + (len(junk) + 2).to_bytes(2, "big") + junk + file[2:]


METADATA = (
    (b"\xe1", b"Exif\0\0"),
    (b"\xe1", b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="9"'),
    (b"\xe2", b"ICC_PROFILE\0"),
    (b"\xe2", b"MPF\0"),
    (b"\xed", b"Photoshop 3.0\0" + b"8BIM"),
    (b"\xee", b"Adobe"),
    (b"\xe0", b"JFIF"),
)


def no_image_at_all(file: bytes, rng: Random) -> bytes:
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    return (b"", page, rng.bytes(500), b"%PDF-1.7\n", b"8BPS\0\1" + bytes(20), b"%!PS-Adobe-3.0 EPSF\n")[
        rng.integers(0, 6)
    ]


MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    unchanged, truncated, without_its_end, with_bits_flipped, with_a_block_zeroed, with_its_header_edited,
    with_a_piece_cut_out, with_a_piece_doubled, with_trailing_junk, with_leading_junk, with_another_signature,
    with_other_dimensions, with_broken_metadata, no_image_at_all,
)  # fmt: skip


def odd_files(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files, most of them broken in some way, each with the name of the way; every kind meets every way in turn."""
    rng = np.random.default_rng(seed)
    files: list[bytes] = []
    for number in range(count):
        kind, round_ = number % len(MUTATIONS), number // len(MUTATIONS)
        if kind == 0 and round_ % 80 == 0:
            files = seeds(rng)  # another picture now and then
        mutate = MUTATIONS[kind]
        yield mutate.__name__, mutate(files[round_ % len(files)], rng)
