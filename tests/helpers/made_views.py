"""Pictures for tests of the augmentations, and draws for them."""

import numpy as np
import torch
from PIL import Image

from moco.data.augment import draw


def photographs(count, height, width, seed=0):
    """Smooth colors with noise; some of them saturated, gray or dark: uint8 (count, 3, height, width)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    images = np.empty((count, 3, height, width), np.uint8)
    for i, image in enumerate(images):
        a, b, phase, level = rng.uniform(-6, 6, (4, 3, 1, 1))
        smooth = 128 + 10 * level + 90 * np.sin(a * x + b * y + phase)
        if i % 4 == 1:
            smooth = 128 + 4 * (smooth - 128)
        elif i % 4 == 2:
            smooth = smooth[:1].repeat(3, 0) + rng.integers(0, 3, smooth.shape)
        elif i % 4 == 3:
            smooth = smooth / 8
        image[:] = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255)
    return torch.from_numpy(images)


def drawn(recipe, count, seed=0):
    return np.concatenate([draw(recipe, 50, 40, seed, 0, i, views=1) for i in range(count)])


def to_pil(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
