"""Any image Pillow can open, as upright 8-bit RGB."""

import numpy as np
from PIL import Image, ImageOps

# No file says what value is white in these modes: it is the first full scale that holds the brightest pixel.
FULL_SCALES = {"I": (255.0, 65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}


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
    image = ImageOps.exif_transpose(image)
    if image.mode in FULL_SCALES or image.mode.startswith("I;16"):
        image = _eight_bit_gray(image)
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    """Scale a gray image of 16 or 32 bits to 256 levels; values below zero become black."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image holds pixels that are not finite")
    peak = values.max()
    white = next((scale for scale in FULL_SCALES.get(image.mode, (65535.0,)) if peak <= scale), peak)
    return Image.fromarray(np.rint(values.clip(min=0) * (255 / white)).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an RGBA image on white."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
