"""Pictures for tests of the augmentations, what is drawn for them, and the published transforms."""

from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from moco.data.augment import draw, linear_train, moco_v1, moco_v2

RECIPES = {"v1": moco_v1(), "v2": moco_v2(), "linear": linear_train()}


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


def photograph(width, height, seed=0):
    """One of them as decoders give it: uint8 (height, width, 3)."""
    return photographs(2, height, width, seed)[1].permute(1, 2, 0).contiguous().numpy()


def drawn(recipe, count, seed=0):
    return np.concatenate([draw(recipe, 50, 40, seed, 0, i, views=1) for i in range(count)])


def to_pil(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def published(image, view, name, size=None):
    """A PIL image to float32 3 x S x S by the transforms of the published programs, which draw what `view`, a
    record of VIEW, says. name: of a recipe; size: S, or None without the crop.
    """
    box = tuple(int(view[field]) for field in ("top", "left", "height", "width"))
    factors = [float(view[field]) for field in ("brightness", "contrast", "saturation", "hue")]
    jitter, gray, flip = (float(view[field]) for field in ("jitter", "gray", "flip"))  # 0, 1: never, always
    sigma, order = float(view["sigma"]), torch.tensor(view["order"].tolist())
    steps = {
        "v1": [transforms.RandomGrayscale(gray), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)],
        "v2": [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], jitter),
            transforms.RandomGrayscale(gray),
            transforms.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(sigma))], float(sigma > 0)),
        ],
        "linear": [],
    }[name]
    published = transforms.Compose(
        ([transforms.RandomResizedCrop(size)] if size else [])
        + steps
        + [
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    with (
        mock.patch.object(transforms.RandomResizedCrop, "get_params", lambda *_: box),
        mock.patch.object(transforms.ColorJitter, "get_params", lambda *_: (order, *factors)),
        torch.random.fork_rng(devices=[]),
    ):
        return published(image)
