"""Bytes of any image file Pillow can open to upright 8-bit RGB, or one exception that says why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from e2mc_hf.data.jpeg import decode_plain, plain_size

# Formats of photographs. Those that run programs (EPS) or hold more than pixels (PSD, PDF) are not opened.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Pillow's own limit, kept here because a process may have lifted it. Decoding takes up to 10 bytes a pixel.
PIXEL_LIMIT = 1024**3 // 4 // 3
# Decoders that take more (WebP 16, JPEG 2000 up to 22, TIFF 12 with deep colors): how many times less they may decode.
COSTS = {"WEBP": 2, "TIFF": 2, "AVIF": 2, "JPEG2000": 3}
REASONS = ("empty", "not an image", "truncated", "corrupt", "too large", "unsupported")
# First bytes of `FORMATS`: a file that has them and cannot be identified was an image once.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
# No file says what value is white in these modes: it is the first full scale that holds the brightest pixel.
FULL_SCALES = {"I": (255.0, 65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}
# Pixels converted at a time, to bound the memory for the intermediate forms.
BAND_PIXELS = 1 << 22
ORIENTATION_TAG = 0x0112


class UnreadableImage(Exception):  # noqa: N818 - a state of the file, caught and counted
    """An image that has to be skipped.

    Attributes:
        reason: One of `REASONS`, to count by.
        detail: What the decoder said.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})"


class EncodedImage:
    """An image file of which only the header is read until its pixels are asked for.

    Args:
        encoded: The whole file.

    Attributes:
        size: Width and height in pixels as a viewer shows the image, EXIF rotation applied.

    Raises:
        UnreadableImage: If the header cannot be read, or announces more pixels than may be decoded.
    """

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._image: Image.Image | None = None
        self._orientation = 1
        size = plain_size(encoded)
        self._plain_size = size
        if size is not None:
            _check_size(size, PIXEL_LIMIT)
        else:
            with _every_error_as_unreadable(encoded):
                self._image = _open(encoded)
                size, self._orientation = self._image.size, _orientation(self._image)
            if self._image.format in ("JPEG", "MPO") and self._image.mode in ("L", "RGB"):
                self._plain_size = size
        self.size: tuple[int, int] = size if self._orientation < 5 else (size[1], size[0])

    def pixels(self, reduction: int = 1) -> UInt8[np.ndarray, "height width 3"]:
        """Decode to upright RGB; see `to_rgb` for what becomes of other modes.

        Args:
            reduction: 1, 2, 4 or 8: a JPEG is decoded at this fraction of its size, sides rounded up. Other formats,
                and a JPEG that small, may ignore it.

        Returns:
            A new array, writable and contiguous.

        Raises:
            UnreadableImage: If not all of the image can be decoded.
        """
        assert reduction in (1, 2, 4, 8), reduction
        if self._plain_size is not None:
            pixels = decode_plain(self._encoded, self._plain_size, reduction)
            if pixels is not None:
                return _turn(pixels, self._orientation)
        with _every_error_as_unreadable(self._encoded):
            image, self._image = self._image or _open(self._encoded), None
            if reduction > 1:
                image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
            image.load()
            pixels = _rgb_pixels(image)
            del image  # its memory is needed to turn the pixels of a large one
            return _turn(pixels, self._orientation)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB uint8: first frame, EXIF rotation applied, transparency on white.

    Transparent pixels are composited on white, not dropped: the color stored beneath them is arbitrary, and white is
    what a viewer of the image saw. Deep grays are scaled, because Pillow's own conversion clips them to white.
    Color profiles are ignored.

    Args:
        image: Any mode of Pillow that has a way to RGB; it is not changed, but an animation is rewound.

    Returns:
        A new image of mode RGB.

    Raises:
        ValueError: If the mode has no way to RGB, or a pixel is not finite.
    """
    if getattr(image, "is_animated", False):
        image.seek(0)
    image.load()
    return Image.fromarray(_turn(_rgb_pixels(image), _orientation(image)))


def _open(encoded: bytes) -> Image.Image:
    """Read the header, and all of a format whose header does not tell the rotation."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    limit = pixel_limit(image)
    _check_size(image.size, limit)
    if isinstance(image, TiffImageFile):
        # A tile may be larger than the image, and is decoded whole.
        _check_size((image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)), limit)
    # The EXIF of a PNG may follow its pixels; a TIFF is turned by Pillow while loading.
    if image.format in ("PNG", "TIFF"):
        image.load()
    return image


def pixel_limit(image: Image.Image) -> int:
    """Say how many pixels a file may have, so that decoding it takes less than 1 GB; only the header is looked at."""
    cost = COSTS.get(str(image.format), 1)
    # A progressive JPEG is held in memory as coefficients, and these have one component more.
    return PIXEL_LIMIT // (max(cost, 2) if image.mode == "CMYK" else cost)


def _check_size(size: tuple[int, int], limit: int) -> None:
    """Refuse what would fill the memory."""
    if size[0] * size[1] > limit:
        raise UnreadableImage("too large", f"{size[0]} x {size[1]} pixels, more than {limit:,}")


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; 1 is upright, and what an image has whose EXIF cannot be read."""
    try:
        orientation = int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # parsers of metadata trip over anything, and the pixels may be good all the same
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _turn(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "height width 3"]:
    """Turn and mirror an image to upright; an upright one is returned as it is."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    upright = np.empty(pixels.shape, np.uint8)
    for channel in range(3):  # three times as fast as all at once: numpy's innermost loop would be three bytes long
        upright[..., channel] = pixels[..., channel]
    return upright


def _rgb_pixels(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Convert a loaded image band by band: the intermediate forms of a large image would not fit the memory."""
    width, height = image.size
    white = _white(image)
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _rgb_band(band, white)
    return pixels


def _rgb_band(band: Image.Image, white: float | None) -> UInt8[np.ndarray, "rows width 3"]:
    """Convert some rows to RGB; `white` is the value of white if they are of a deep gray."""
    if white is not None:
        band = _eight_bit_gray(band, white)
    if band.has_transparency_data:
        band = Image.alpha_composite(Image.new("RGBA", band.size, (255, 255, 255, 255)), band.convert("RGBA"))
    return np.asarray(band if band.mode == "RGB" else band.convert("RGB"))


def _white(image: Image.Image) -> float | None:
    """Find the value of white of a gray image of 16 or 32 bits; None for any other."""
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in FULL_SCALES:
        return None
    peak = float(np.max(image.getextrema()))
    return next((scale for scale in FULL_SCALES[image.mode] if peak <= scale), peak)


def _eight_bit_gray(band: Image.Image, white: float) -> Image.Image:
    """Scale deep grays to 256 levels; values below zero become black."""
    values = np.asarray(band, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite are not supported")
    return Image.fromarray(np.rint(values.clip(min=0) * (255 / white)).astype(np.uint8))


@contextmanager
def _every_error_as_unreadable(encoded: bytes) -> Iterator[None]:
    """Turn whatever a broken file makes a decoder trip over into the one exception; drop the decoder's warnings."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if lenient:
            # A process may have set it; what it fills the missing part of an image with is no image.
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        except UnreadableImage:
            raise
        except Exception as error:  # SyntaxError, struct.error, MemoryError, RecursionError, zlib.error, OSError, ...
            raise UnreadableImage(_reason(error, encoded), f"{type(error).__name__}: {error}") from error
        finally:
            if lenient:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def _reason(error: Exception, encoded: bytes) -> str:
    """Sort an error into one of `REASONS`."""
    said = str(error).lower()
    if not encoded:
        return "empty"
    if isinstance(error, Image.DecompressionBombError | MemoryError) or "too large" in said:
        return "too large"
    if isinstance(error, UnidentifiedImageError) and not encoded.startswith(SIGNATURES):
        return "not an image"
    if isinstance(error, EOFError) or "truncated" in said:
        return "truncated"
    return "unsupported" if "not supported" in said or "cannot handle" in said else "corrupt"
