"""A color of its own for each view: pictures as Trifeature's, in which color tells no image from another.

Where both views of an image have its color, color solves a part of the instance task. Where each view has one
of the ten colors at random, color solves none of it, while pictures of every color are seen as often as
before. So encoders of two such trainings know the same pictures; they differ by what color solved, and by
the invariance to it that the second must learn.
"""

import json
from pathlib import Path

import torch

from moco.errors import UserError
from moco.factors import COLORS, SETTINGS, WHITE
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.seeds import RECOLOR, fold
from moco.trifeature_draw import GREY


def check_white(folder):
    """Raise UserError unless the images in `folder` are Trifeature's, all in white."""
    try:
        drawn = json.loads((Path(folder) / SETTINGS).read_text())["hide"]
    except (OSError, ValueError, TypeError, KeyError):
        drawn = None
    if drawn != WHITE:
        raise UserError(
            f"a run with --recolor gives colors to pictures that are drawn in white, and those in {folder} "
            f"are not; draw some with python -m moco.trifeature DIR --hide {WHITE}"
        )


def colors_of(seed, epoch, view, indices):
    """float32 (N, 3) in 0 to 1: the colors of view 0 or 1 of the training images `indices` in an epoch."""
    known = torch.tensor(list(COLORS.values()))
    return known[[fold(seed, RECOLOR, epoch, view, index) % len(known) for index in indices]]


def recolored(views, colors):
    """Normalised views (N, 3, H, W) of pictures in white on grey, with the `colors` (N, 3) in its place.

    A picture is grey + a (color - grey), with `a` the ink of each pixel, and resizing leaves it so: the same
    as views of pictures that were drawn in these colors, but for their roundings to bytes.
    """
    mean, std = (torch.tensor(v, device=views.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    grey = round(255 * GREY) / 255
    ink = (views * std + mean - grey) / (1 - grey)  # N x 3 x H x W, alike in all channels
    return (grey + ink * (colors.to(views)[:, :, None, None] - grey) - mean) / std
