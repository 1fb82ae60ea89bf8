"""An image that is decoded already, for tests of what comes after decoding."""

import numpy as np
from PIL import Image


class DecodedImage:
    def __init__(self, pixels):
        self.full = np.array(pixels)
        self.size = self.full.shape[1::-1]

    def pixels(self, reduction=1):
        return self.full

    def pillow(self):
        return Image.fromarray(self.full)


def noise(height, width, seed=0):
    return DecodedImage(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
