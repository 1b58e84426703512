"""Transforms of PIL images under the names that code written for MoCo imports.

The programs themselves draw in moco.data.augment and apply in moco.data.pil and moco.data.device.
"""

import torch
from PIL import ImageFilter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TwoCropsTransform:
    """Apply `base_transform` twice to an image: `[q, k]`, two views drawn independently."""

    def __init__(self, base_transform):
        self.base_transform = base_transform

    def __call__(self, image):
        return [self.base_transform(image), self.base_transform(image)]


class GaussianBlur:
    """Blur a PIL image with a radius drawn uniformly from `sigma`, in pixels (Chen et al. 2020, SimCLR)."""

    def __init__(self, sigma=(0.1, 2.0)):
        self.sigma = sigma

    def __call__(self, image):
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(()).uniform_(low, high).item()))
