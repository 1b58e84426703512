"""JPEG files that cost a decoder what photographs cost, for measurements where no data set is at hand.

The pictures are dead leaves, discs that hide each other with sizes from a power law (Lee, Mumford & Huang,
"Occlusion models for natural images", 2001), painted with noise whose amplitude falls as 1 / frequency, as
that of natural images does (Field 1987). Sizes are those that ImageNet mostly has, and the quality of each
file is chosen so that a pixel takes as many bytes as there: both together decide the time of decoding.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Width and height in pixels; on average 548 x 434 and 0.25 million, with which a file takes 103 KB.
SIZES = (
    *((500, 375), (640, 480), (500, 333), (500, 375), (375, 500), (1024, 683), (500, 375)),
    *((500, 333), (500, 375), (800, 600), (333, 500), (500, 375), (500, 400), (500, 375)),
)
BYTES_PER_PIXEL = 0.42
LEAVES = 120


def make_photographs(folder, count, seed=0):
    """Write `count` JPEG files into `folder`, the same for the same seed; their paths."""
    paths = []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        width, height = SIZES[index % len(SIZES)]
        path = Path(folder, f"{index:05}.jpg")
        path.write_bytes(_jpeg(photograph(rng, width, height), BYTES_PER_PIXEL * width * height))
        paths.append(str(path))
    return paths


def photograph(rng, width, height):
    """A picture, uint8 (height, width, 3), from numpy's Generator `rng`."""
    leaf = _leaves(rng, width, height)
    colour = rng.normal(0, 40, (LEAVES + 1, 1)) + rng.normal(0, 12, (LEAVES + 1, 3))
    contrast = rng.uniform(0.1, 1, (LEAVES + 1, 1))
    light = _pink(rng, width, height)
    tint = np.stack([_pink(rng, width, height) for _ in range(3)], 2)
    texture = 45 * light[:, :, None] + 10 * tint
    grain = rng.normal(0, 3, (height, width, 1))
    pixels = 120 + colour[leaf] + contrast[leaf] * texture + grain
    return pixels.clip(0, 255).astype(np.uint8)


def _leaves(rng, width, height):
    """For each pixel the number of the disc that is seen there, the last one drawn; 0: none."""
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    smallest, largest = 4.0, width / 2
    for number in range(1, LEAVES + 1):
        # Radii r with density r^-3 between the two: all scales cover the same share of the picture.
        radius = (smallest**-2 + rng.random() * (largest**-2 - smallest**-2)) ** -0.5
        radius = max(radius, largest / number)  # the first ones are large, so that no hole is left
        x, y = rng.random(2) * (width, height)
        flat = rng.uniform(0.5, 1)
        draw.ellipse((x - radius, y - radius * flat, x + radius, y + radius * flat), fill=number)
    return np.asarray(picture)


def _pink(rng, width, height):
    """Noise (height, width) of mean 0 and deviation 1, its amplitude in proportion to 1 / frequency."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency, (height, width))
    return noise / noise.std()


def _jpeg(pixels, size):
    """A JPEG file of about `size` bytes: the best quality that does not exceed them, 30 to 97."""
    image, low, high = Image.fromarray(pixels), 30, 97
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_encoded(image, middle)) <= size else (low, middle - 1)
    return _encoded(image, low)


def _encoded(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
