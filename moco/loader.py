"""Augmentations on PIL images: the published recipes with their numbers, as named functions.

All draws come from torch's CPU generator, so that one seed per sample decides them (moco.data).
"""

import torch
from PIL import ImageFilter
from torchvision import transforms

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


def moco_v1(size):
    """MoCo v1's views (He et al. 2020, section 3.4): PIL image to 3 x size x size float32."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomGrayscale(p=0.2),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomHorizontalFlip(),
            *_to_normalised_tensor(),
        ]
    )


def moco_v2(size):
    """MoCo v2's views, `--aug-plus` (Chen et al. 2020, section 3): PIL image to 3 x size x size float32."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
            *_to_normalised_tensor(),
        ]
    )


def linear_train(size):
    """What linear classifiers are trained on: PIL image to 3 x size x size float32."""
    return transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *_to_normalised_tensor()]
    )


def linear_val(size):
    """What they are tested on, 224 of 256 pixels at the usual size: PIL image to 3 x size x size float32."""
    return transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *_to_normalised_tensor()]
    )


def _to_normalised_tensor():
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
