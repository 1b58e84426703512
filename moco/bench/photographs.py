"""JPEG files that cost a decoder what photographs cost, for measurements where no data set is at hand.

The pictures are noise whose amplitude falls as 1 / frequency, as that of natural images does (Field 1987).
Sizes are those that ImageNet mostly has, and the quality of each file is chosen so that a pixel takes as many
bytes as there: both together decide the time of decoding.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

# Width and height in pixels; on average 548 x 434 and 0.25 million, with which a file takes 103 KB.
SIZES = (
    *((500, 375), (640, 480), (500, 333), (500, 375), (375, 500), (1024, 683), (500, 375)),
    *((500, 333), (500, 375), (800, 600), (333, 500), (500, 375), (500, 400), (500, 375)),
)
BYTES_PER_PIXEL = 0.42


def make_photographs(folder, count, seed=0):
    """Write `count` JPEG files into `folder`, the same for the same seed; their paths."""
    paths = []
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        image = photograph(np.random.default_rng((seed, index)), width, height)
        low, high = 30, 97  # the best quality whose file is not too large
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(_jpeg(image, middle)) <= BYTES_PER_PIXEL * width * height
            low, high = (middle, high) if fits else (low, middle - 1)
        path = Path(folder, f"{index:05}.jpg")
        path.write_bytes(_jpeg(image, low))
        paths.append(str(path))
    return paths


def photograph(rng, width, height):
    """A PIL image from numpy's Generator `rng`: light that all channels share, a little color, and grain."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectra = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency
    noise = np.fft.irfft2(spectra, (height, width))  # 4 x H x W
    light, *color = noise / noise.std(axis=(1, 2), keepdims=True)
    grain = rng.normal(0, 3, (height, width))
    pixels = 120 + 45 * light + 10 * np.stack(color) + grain
    return Image.fromarray(np.moveaxis(pixels, 0, -1).clip(0, 255).astype(np.uint8))


def _jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
