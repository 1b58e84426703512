"""Trifeature images: inside the canvas, in the right colors, all different."""

import itertools

import numpy as np
import pytest

from moco.trifeature.draw import COLORS, SHAPES, TEMPLATE, TEXTURES, render


def test_values_are_the_published_ones():
    assert " ".join(SHAPES) == "triangle square plus circle tee rhombus pentagon star fivesquare trapezoid"
    assert " ".join(TEXTURES) == "solid stripes grid hexgrid dots noise triangles zigzags rain pluses"
    assert " ".join(COLORS) == "red green blue yellow pink cyan purple ocean orange white"
    published = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 102, 255)]
    published += [(0, 255, 255), (76, 0, 128), (26, 102, 128), (255, 153, 0), (255, 255, 255)]
    for color, value in zip(COLORS, published, strict=True):
        image = render("square", "solid", color, 64, np.random.default_rng(0))
        pixels, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        common = {tuple(pixels[k].tolist()) for k in counts.argsort()[-2:]}
        assert common == {(128, 128, 128), value}


@pytest.mark.parametrize("size", [16, 64])
def test_every_combination_lies_inside_in_its_own_color(size):
    seen = set()
    for number, combination in enumerate(itertools.product(SHAPES, TEXTURES, COLORS)):
        rng = np.random.default_rng(number // 100)  # one place for all images of a shape
        image = render(*combination, size, rng)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 128).all()
        strongest = image.reshape(-1, 3)[np.abs(image.reshape(-1, 3) - 128.0).sum(1).argmax()]
        nearest = min(COLORS, key=lambda name: np.abs(255 * np.array(COLORS[name]) - strongest).sum())
        assert nearest == combination[2]
        if size == 64:  # large enough to hold a pixel of pure ink in every texture
            assert np.abs(255 * np.array(COLORS[nearest]) - strongest).max() <= 0.5
        # every pixel is a mixture of the background and the color
        toward = 255 * np.array(COLORS[nearest]) - 128
        part = (image - 128.0) @ toward / (toward @ toward)
        assert np.abs(128 + part[..., None] * toward - image).max() <= 1.5
        seen.add(image.tobytes())
    assert len(seen) == 1000


def test_shape_and_texture_turn_independently_and_the_place_is_random():
    def measure(seed):
        image = render("square", "stripes", "white", 224, np.random.default_rng(seed))[..., 0] / 255
        y, x = np.nonzero(image != image[0, 0])
        middle = image[y.min() : y.max(), x.min() : x.max()][40:-40, 40:-40]
        down, right = np.gradient(middle)  # across stripes: their structure tensor gives their direction
        slope = np.arctan2(2 * (down * right).mean(), (down**2 - right**2).mean()) / 2
        return (x.min() + x.max()) / 2, (y.min() + y.max()) / 2, np.ptp(x) + 1, np.degrees(slope)

    x, y, width, slope = np.array([measure(seed) for seed in range(200)]).T
    side = 0.84 * TEMPLATE * 224
    assert side - 1 <= width.min() < 1.05 * side  # upright
    assert 1.39 * side < width.max() <= 1.42 * side + 1  # turned by 45 degrees
    assert -46 < slope.min() < -40 and 40 < slope.max() < 46 and abs(slope.mean()) < 6
    assert x.min() < 75 and x.max() > 150 and y.min() < 75 and y.max() > 150
    correlation = np.corrcoef([x, y, width, slope, np.abs(slope)])
    assert np.abs(correlation[np.triu_indices(5, 1)]).max() < 0.25
