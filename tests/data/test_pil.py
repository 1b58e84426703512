"""Draws applied on the CPU: the pixels of the published transforms to the bit."""

import warnings

import numpy as np
import pytest
import torch
from made_views import RECIPES, photograph, published
from PIL import Image
from torchvision import transforms

from moco.data.augment import draw, linear_train, moco_v1, moco_v2
from moco.data.device import normalize
from moco.data.pil import center_resize, crop_resize, photometric

SIZE = 224
PHOTOGRAPHS = [photograph(*size, seed) for seed, size in enumerate([(569, 427), (375, 500), (90, 70)])]


def ours(image, view, name):
    pixels = crop_resize(image, view, SIZE, "pil")
    return normalize(photometric(pixels, view, RECIPES[name].gray_first))


def equals_published(image, view, name):
    return torch.equal(ours(image, view, name), published(Image.fromarray(image), view, name, SIZE))


@pytest.mark.parametrize("name", RECIPES)
def test_views_are_the_published_ones_to_the_bit(name):
    views = []
    for number, image in enumerate(PHOTOGRAPHS):
        for index in range(6):
            for view in draw(RECIPES[name], *image.shape[1::-1], 0, number, index):
                assert equals_published(image, view, name)
                views.append(view)
    varying = {"v1": ["gray", "flip"], "v2": ["jitter", "gray", "flip", "sigma"], "linear": ["flip"]}[name]
    for field in varying:
        assert {bool(view[field]) for view in views} == {False, True}, field  # every case came up


def test_every_field_of_a_view_matters():
    """The negative control of the test above."""
    image, view = PHOTOGRAPHS[0], draw(moco_v2(), 569, 427, 0, 0, 0)[0]
    view["jitter"], view["gray"], view["flip"], view["sigma"] = True, False, False, 1.0
    view["order"], view["hue"] = (3, 1, 2, 0), 0.05
    view["top"], view["left"], view["height"], view["width"] = 20, 20, 300, 350
    assert equals_published(image, view, "v2")
    changes = {
        "top": 21,
        "left": 21,
        "height": 301,
        "width": 351,
        "jitter": False,
        "gray": True,
        "flip": True,
    }
    changes |= {"order": (0, 2, 1, 3), "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.06}
    changes |= {"sigma": 1.2}
    assert set(changes) == set(view.dtype.names)
    for name, value in changes.items():
        changed = view.copy()
        changed[name] = value
        assert not torch.equal(ours(image, changed, "v2"), ours(image, view, "v2")), name


def test_grayscale_comes_first_in_v1_and_later_in_v2():
    image, view = PHOTOGRAPHS[0], draw(moco_v1(), 569, 427, 0, 0, 0)[0]
    view["gray"], view["hue"], view["saturation"] = True, 0.3, 1.4
    assert equals_published(image, view, "v1") and equals_published(image, view, "v2")
    assert not torch.equal(ours(image, view, "v1"), ours(image, view, "v2"))


def test_torch_resize_is_within_two_levels_of_pils():
    differing, two, far = [], 0, 0
    for image in [*PHOTOGRAPHS, photograph(2000, 1500, 3)]:
        for view in draw(linear_train(), *image.shape[1::-1], 0, 0, 0, views=8):
            pil = crop_resize(image, view, SIZE, "pil").int()
            difference = (crop_resize(image, view, SIZE, "torch").int() - pil).abs()
            assert difference.max() <= 2
            two += (difference > 1).sum().item()
            differing.append((difference > 0).float().mean().item())
            crop = image[view["top"] :, view["left"] :][: view["height"], : view["width"]].copy()
            plain = torch.nn.functional.interpolate(
                torch.from_numpy(crop).permute(2, 0, 1)[None], (SIZE, SIZE), mode="bilinear"
            )
            far = max(far, (plain[0].int() - pil).abs().max().item())
    assert 0 < np.mean(differing) < 0.1
    assert two < 10  # of five million values
    assert far > 20  # negative control: without antialiasing


@pytest.mark.parametrize("size", [224, 32])
def test_validation_view_is_that_of_resize_and_center_crop(size):
    for image in [*PHOTOGRAPHS, photograph(301, 301, 4), photograph(333, 256, 5), photograph(40, 601, 6)]:
        resize_and_crop = transforms.Compose(
            [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.ToTensor()]
        )
        levels = (resize_and_crop(Image.fromarray(image)) * 255).round().to(torch.uint8)
        assert torch.equal(center_resize(image, size, "pil"), levels)
        assert (center_resize(image, size, "torch").int() - levels.int()).abs().max() <= 1
        assert not torch.equal(center_resize(np.roll(image, 1, (0, 1)), size, "pil"), levels)


@pytest.mark.parametrize("resize", ["pil", "torch"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_are_written_into_the_slot_they_are_given(resize, layout):
    image = PHOTOGRAPHS[0].copy()
    image.flags.writeable = False  # as decoders may give it; torch warns of such memory
    view = draw(moco_v2(), 569, 427, 0, 0, 0)[0]
    for function, arguments in (
        (crop_resize, (image, view, 64, resize)),
        (center_resize, (image, 64, resize)),
    ):
        batch = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8).contiguous(memory_format=layout)
        slot = batch[2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert function(*arguments, out=slot) is slot
            alone = function(*arguments)
        assert alone.dtype == torch.uint8 and alone.is_contiguous() and torch.equal(batch[2], alone)
        assert (batch[[0, 1, 3]] == 7).all() and not (batch[2] == 7).all()
