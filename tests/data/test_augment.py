"""What is drawn: torchvision's distributions, and a function of (seed, epoch, index, view) alone."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from moco.data.augment import VIEW, draw, linear_train, moco_v1, moco_v2

COUNT = 10_000


def disagreement(a, b):
    """How two samples (n, columns) differ: the least p of Kolmogorov-Smirnov's test and the largest z.

    z compares first and second moments, those between columns included, in standard errors.
    """
    p = min(stats.ks_2samp(x, y, method="asymp").pvalue for x, y in zip(a.T, b.T, strict=True))
    both = np.concatenate([a, b])
    deviation = both.std(0)
    centered = [(x - both.mean(0))[:, deviation > 0] / deviation[deviation > 0] for x in (a, b)]
    pairs = np.triu_indices(centered[0].shape[1])
    moments = [np.concatenate([x, x[:, pairs[0]] * x[:, pairs[1]]], axis=1) for x in centered]
    (m, v), (n, w) = ((x.mean(0), x.var(0) / len(x)) for x in moments)
    varies = v + w > 1e-12
    return p, np.max(np.abs(m - n)[varies] / np.sqrt(v + w)[varies], initial=0)


def agree(a, b):
    p, z = disagreement(a, b)
    return p > 1e-3 and z < 4.5


def clearly_differ(a, b):
    p, z = disagreement(a, b)
    return p < 1e-6 or z > 6


def ours(recipe, size=(569, 427), count=COUNT):
    """(count, 2) of VIEW."""
    return np.stack([draw(recipe, *size, 1, 0, index) for index in range(count)])


def boxes_of(top, left, height, width):
    return np.stack([top, left, height, width, height * width, np.log(width / height)], axis=1)


def our_boxes(recipe, size, count=COUNT):
    views = ours(recipe, size, count // 2).reshape(-1)
    return boxes_of(*(views[name].astype(float) for name in ("top", "left", "height", "width")))


def their_boxes(size, scale):
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0], dtype=torch.uint8)
    crop = transforms.RandomResizedCrop(8, scale)
    drawn = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(COUNT)]
    return boxes_of(*np.array(drawn, float).T)


def our_colors(views):
    """(count, 2) of VIEW to (count, columns): the operations of both views."""
    names = ("jitter", "gray", "flip", "sigma", *VIEW.names[8:12])
    columns = [views[name] for name in names] + [views["sigma"] > 0, *np.moveaxis(views["order"], -1, 0)]
    return np.concatenate(columns, axis=1).astype(float)


def their_colors(jitter, jitter_p, gray_p, blur_p):
    """The same columns from torchvision's transforms, applied to images that show what was done to them."""
    torch.manual_seed(0)
    color = transforms.ColorJitter(*jitter)
    apply_jitter = transforms.RandomApply([lambda _: 1.0], p=jitter_p)
    blur = transforms.RandomApply([lambda _: transforms.GaussianBlur.get_params(0.1, 2.0)], p=blur_p)
    gray, flip = transforms.RandomGrayscale(p=gray_p), transforms.RandomHorizontalFlip()
    red, edge = torch.tensor([1.0, 0, 0]).view(3, 1, 1), torch.tensor([[[0.0, 1.0]]])

    def one():
        order, *factors = color.get_params(color.brightness, color.contrast, color.saturation, color.hue)
        sigma = blur(0.0)
        flags = [apply_jitter(0.0), float(gray(red)[0] < 1), float(flip(edge)[0, 0, 0])]
        return [*flags, sigma, *factors, sigma > 0, *order.tolist()]

    return np.array([[one(), one()] for _ in range(COUNT)]).transpose(0, 2, 1).reshape(COUNT, -1)


@pytest.mark.parametrize(
    ("recipe", "scale", "size"),
    [
        (linear_train(), (0.08, 1.0), (500, 375)),
        (moco_v1(), (0.2, 1.0), (64, 64)),
        (moco_v2(), (0.2, 1.0), (569, 427)),
        (moco_v2(), (0.2, 1.0), (300, 100)),  # here and in the next many draws, and not all, end in the
        (moco_v2(), (0.2, 1.0), (110, 300)),  # central fallback
        (moco_v2(), (0.2, 1.0), (900, 60)),
        (moco_v2(), (0.2, 1.0), (1, 1)),
        (moco_v2(), (0.2, 1.0), (7, 3)),
    ],
)
def test_boxes_are_distributed_as_those_of_random_resized_crop(recipe, scale, size):
    boxes, reference = our_boxes(recipe, size), their_boxes(size, scale)
    assert agree(boxes, reference)
    top, left, height, width = boxes[:, :4].T
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[1]).all() and (left + width <= size[0]).all()
    if size in ((569, 427), (300, 100)):  # negative controls: ranges that are a little smaller
        assert clearly_differ(our_boxes(replace(recipe, scale=(0.25, 1.0)), size, 4000), reference)
        assert clearly_differ(our_boxes(replace(recipe, ratio=(4 / 5, 4 / 3)), size, 4000), reference)


def test_operations_and_factors_are_distributed_as_those_of_torchvision():
    published = their_colors((0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)
    views = ours(moco_v2())
    assert agree(our_colors(views), published)
    v1 = our_colors(ours(moco_v1()))
    assert agree(v1, their_colors((0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2, blur_p=0.0))
    assert moco_v1().gray_first and not moco_v2().gray_first
    linear = ours(linear_train())
    assert not any(linear[name].any() for name in ("jitter", "gray", "sigma"))
    assert abs(linear["flip"].mean() - 0.5) < 4 * 0.5 / np.sqrt(linear.size)
    # Negative controls: slightly different recipes, and views that are not independent.
    for change in (
        {"jitter": (0.45, 0.4, 0.4, 0.1)},
        {"jitter": (0.4, 0.45, 0.4, 0.1)},
        {"jitter": (0.4, 0.4, 0.45, 0.1)},
        {"jitter": (0.4, 0.4, 0.4, 0.12)},
        {"jitter_p": 0.75},
        {"gray_p": 0.25},
        {"blur_p": 0.55},
        {"blur_sigma": (0.1, 2.3)},
        {"flip_p": 0.55},
    ):
        changed = ours(replace(moco_v2(), **change), count=6000)
        assert clearly_differ(our_colors(changed), published), change
    for name in ("flip", "hue"):
        dependent = views.copy()
        dependent[name][:, 1] = dependent[name][:, 0]
        assert clearly_differ(our_colors(dependent), published), name


def test_draws_depend_on_their_position_alone():
    positions = list(itertools.product((0, 7), (0, 3), (0, 1, 999), (1, 2)))
    first = {p: draw(moco_v2(), 569, 427, *p) for p in positions}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    random.Random(0).shuffle(positions)
    for p in positions:
        assert np.array_equal(draw(moco_v2(), 569, 427, *p), first[p])
        assert np.array_equal(first[p][:1], first[(*p[:3], 1)])
    # Neither reads nor moves the generators that everybody shares.
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    rows = [
        row.tobytes()
        for seed, epoch, index in itertools.product((0, 1, 2**31 - 1), range(3), range(1000))
        for row in draw(moco_v2(), 569, 427, seed, epoch, index)
    ]
    assert len(set(rows)) == len(rows) == 18_000


def test_recorded_draw():
    """A run that continues under another version must get the same samples."""
    first, second = draw(moco_v2(), 569, 427, seed=1, epoch=2, index=3)
    factors = np.array([0.8898994, 1.2983198, 1.359186, 0.020632336, 1.2934674], np.float32)
    assert first.tolist()[:7] == (15, 19, 368, 368, True, False, False)
    assert first["order"].tolist() == [2, 0, 1, 3]
    assert np.array_equal(np.array([first[name] for name in VIEW.names[8:]]), factors)
    assert second.tolist()[:7] == (5, 89, 342, 403, True, True, True)
    assert second["sigma"] == np.float32(1.6201346)
