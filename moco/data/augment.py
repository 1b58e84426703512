"""Every random number of an augmentation, drawn per sample from (seed, epoch, index, view) and nothing else.

A draw says where to crop and what to do to the colors; it touches no pixel. It is applied on a CPU
(moco.data.pil) or on a device (moco.data.device), in any process and batch, to the same sample.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np

from moco.seeds import SAMPLE


@dataclass(frozen=True)
class Recipe:
    """What is drawn for a view, in the terms of torchvision's transforms; ranges are (low, high), uniform.

    An amount of 0 in `jitter` gives a neutral factor. Unlike with ColorJitter(hue=0), a jitter without hue
    still converts to HSV's bytes and back.
    """

    scale: tuple[float, float]  # the crop's share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # the crop's width / height, uniform in its logarithm
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)  # ColorJitter's: 1 +- the first three, +- hue
    jitter_p: float = 0.0  # p: how probable each operation is
    gray_p: float = 0.0
    gray_first: bool = False  # grayscale before jitter, as in MoCo v1
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the resized view
    flip_p: float = 0.5


def moco_v1():
    """MoCo v1's views (He et al. 2020, section 3.4)."""
    return Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2, gray_first=True)


def moco_v2():
    """MoCo v2's views, `--aug-plus` (Chen et al. 2020, section 3)."""
    return Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)


def crops():
    """Crops and flips alone (`--crops-only`), which leave an image its colors."""
    return Recipe(scale=(0.2, 1.0))


def pretraining(aug_plus=False, crops_only=False):
    """The Recipe of pre-training for the flags --aug-plus and --crops-only."""
    if crops_only:
        return crops()
    return moco_v2() if aug_plus else moco_v1()


def linear_train():
    """The views that linear classifiers are trained on: a crop and a flip."""
    return Recipe(scale=(0.08, 1.0))


# What was drawn for one view. Factors are float32, so that every device computes with the same number.
VIEW = np.dtype(
    [
        ("top", "<i4"),  # the box, in pixels of the image
        ("left", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("jitter", "?"),  # whether the factors below are applied; they are drawn in any case
        ("gray", "?"),
        ("flip", "?"),
        ("order", "i1", (4,)),  # the jitter's: a permutation of 0 brightness 1 contrast 2 saturation 3 hue
        ("brightness", "<f4"),
        ("contrast", "<f4"),
        ("saturation", "<f4"),
        ("hue", "<f4"),
        ("sigma", "<f4"),  # of the blur, in pixels; 0: no blur
    ]
)

PACKED = struct.Struct("<4i3?4b5f")  # VIEW's bytes; packing them is ten times as fast as numpy's conversion

TRIES = 10  # boxes that may fail to fit before the central one is taken, as in RandomResizedCrop
NUMBERS = 2 * TRIES + 2 + 9 + 4  # uniform numbers of a view: its tries and place, the rest, the order's keys


def draw(recipe, width, height, seed, epoch, index, views=2):
    """Draw views of image `index`, width x height pixels, in `epoch` of the run `seed`: (views,) of VIEW.

    The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomApply,
    RandomGrayscale and RandomHorizontalFlip, and a uniform sigma. Each view takes NUMBERS numbers, used or
    not: so view 0 does not depend on `views`, nor a box on a recipe's probabilities.
    """
    numbers = _uniform(views * NUMBERS, seed, SAMPLE, epoch, index)
    drawn = [
        _view(recipe, width, height, numbers[first : first + NUMBERS])
        for first in range(0, views * NUMBERS, NUMBERS)
    ]
    return np.frombuffer(bytearray(b"".join(drawn)), VIEW)


def _uniform(count, *position):
    """`count` floats in [0, 1) that are a function of `position`, as SHAKE-128 makes them of its digits.

    A hash has no state to be set up: it takes a fifth of the time of seeding a generator for each sample.
    """
    digits = b",".join(b"%d" % number for number in position)
    integers = np.frombuffer(hashlib.shake_128(digits).digest(8 * count), "<u8")
    return ((integers >> np.uint64(11)) * 2.0**-53).tolist()  # Python's floats: numpy's scalars are slower


def _view(recipe, width, height, numbers):
    """One view as PACKED bytes, from NUMBERS uniform numbers in [0, 1)."""
    jitter, brightness, contrast, saturation, hue, gray, blur, sigma, flip = numbers[2 * TRIES + 2 : -4]
    keys = numbers[-4:]
    a, b, c, d = recipe.jitter
    low, high = recipe.blur_sigma
    return PACKED.pack(
        *_box(recipe.scale, recipe.ratio, width, height, numbers),
        jitter < recipe.jitter_p,
        gray < recipe.gray_p,
        flip < recipe.flip_p,
        *sorted((0, 1, 2, 3), key=keys.__getitem__),
        _factor(a, brightness),
        _factor(b, contrast),
        _factor(c, saturation),
        d * (2 * hue - 1),
        low + (high - low) * sigma if blur < recipe.blur_p else 0.0,
    )


def _factor(amount, number):
    """Uniform in 1 - amount, or 0, to 1 + amount."""
    low = max(0, 1 - amount)
    return low + (1 + amount - low) * number


def _box(scale, ratio, width, height, numbers):
    """RandomResizedCrop's (top, left, height, width): the first try that fits, else the central crop."""
    area, smallest, range_ = width * height, scale[0], scale[1] - scale[0]
    log_low, log_range = _log_range(*ratio)
    for number in range(0, 2 * TRIES, 2):
        target = area * (smallest + range_ * numbers[number])
        aspect = math.exp(log_low + log_range * numbers[number + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            down, right = numbers[2 * TRIES : 2 * TRIES + 2]
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@cache
def _log_range(low, high):
    return math.log(low), math.log(high) - math.log(low)
