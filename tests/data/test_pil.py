"""Applying draws on the CPU: equal to the published transforms, which are written out here, bit for bit."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from moco.data.augment import draw, linear_train, moco_v1, moco_v2
from moco.data.device import normalize
from moco.data.pil import center_resize, crop_resize, photometric

RECIPES = {"v1": moco_v1(), "v2": moco_v2(), "linear": linear_train()}
SIZE = 224


def photograph(width, height, seed=0):
    """Smooth shapes with sharp edges, shading and a sensor's noise: a PIL image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        inside = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) < rng.uniform(0.3) * width
        smooth[inside] = smooth[inside] * 0.4 + rng.uniform(0, 150, 3)
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


PHOTOGRAPHS = [photograph(*size, seed) for seed, size in enumerate([(569, 427), (375, 500), (90, 70)])]


def ours(image, view, recipe, resize="pil", size=SIZE):
    pixels = crop_resize(image, view, size, resize)
    return normalize(photometric(pixels, view, RECIPES[recipe].gray_first))


@pytest.fixture
def published(monkeypatch):
    """`published(image, view, recipe)`: torchvision's transforms, made to draw what `view` says."""

    def run(image, view, recipe, size=SIZE):
        box = tuple(int(view[name]) for name in ("top", "left", "height", "width"))
        factors = [float(view[name]) for name in ("brightness", "contrast", "saturation", "hue")]
        order = torch.tensor(view["order"].tolist())
        monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(lambda *_: box))
        monkeypatch.setattr(transforms.ColorJitter, "get_params", staticmethod(lambda *_: (order, *factors)))
        p = {name: float(view[name]) for name in ("jitter", "gray", "flip")}  # 0 or 1: never or always
        sigma = float(view["sigma"])
        end = [
            transforms.RandomHorizontalFlip(p["flip"]),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
        steps = {
            "v1": [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomGrayscale(p["gray"]),
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            ],
            "v2": [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p["jitter"]),
                transforms.RandomGrayscale(p["gray"]),
                transforms.RandomApply(
                    [lambda x: x.filter(ImageFilter.GaussianBlur(radius=sigma))], float(sigma > 0)
                ),
            ],
            "linear": [transforms.RandomResizedCrop(size)],
        }[recipe]
        return transforms.Compose(steps + end)(image)

    torch.manual_seed(0)
    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_are_the_published_ones_bit_for_bit(recipe, published):
    views = []
    for number, image in enumerate(PHOTOGRAPHS):
        for index in range(6):
            for view in draw(RECIPES[recipe], *image.size, 0, number, index):
                assert torch.equal(ours(image, view, recipe), published(image, view, recipe))
                views.append(view)
    for name in {"v1": ["gray", "flip"], "v2": ["jitter", "gray", "flip", "sigma"], "linear": ["flip"]}[
        recipe
    ]:
        assert {bool(view[name]) for view in views} == {False, True}, name  # every case came up


def test_every_field_of_a_view_matters(published):
    """The negative control of the test above."""
    image = PHOTOGRAPHS[0]
    view = draw(moco_v2(), *image.size, 0, 0, 0)[0]
    view["jitter"], view["gray"], view["flip"], view["sigma"] = True, False, False, 1.0
    view["order"], view["hue"] = (3, 1, 2, 0), 0.05
    view["top"] = view["left"] = 20
    view["height"], view["width"] = 300, 350
    reference = published(image, view, "v2")
    assert torch.equal(ours(image, view, "v2"), reference)
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
        assert not torch.equal(ours(image, changed, "v2"), reference), name


def test_grayscale_comes_first_in_v1_and_later_in_v2(published):
    image = PHOTOGRAPHS[0]
    view = draw(moco_v1(), *image.size, 0, 0, 0)[0]
    view["gray"], view["hue"], view["saturation"] = True, 0.3, 1.4
    assert torch.equal(ours(image, view, "v1"), published(image, view, "v1"))
    assert torch.equal(ours(image, view, "v2"), published(image, view, "v2"))
    assert not torch.equal(ours(image, view, "v1"), ours(image, view, "v2"))


def test_torch_resize_is_within_two_levels_of_pils():
    """0.1 to 7 of 100 values of a view differ, nearly all by one level; without antialiasing they are far
    off.
    """
    differing, far, two = [], 0, 0
    for image in [*PHOTOGRAPHS, photograph(2000, 1500, 3)]:
        for view in draw(linear_train(), *image.size, 0, 0, 0, views=8):
            pil = crop_resize(image, view, SIZE, "pil").int()
            difference = (crop_resize(image, view, SIZE, "torch").int() - pil).abs()
            assert difference.max() <= 2
            two += (difference > 1).sum().item()
            differing.append((difference > 0).float().mean().item())
            pixels = np.array(image)[view["top"] :, view["left"] :][: view["height"], : view["width"]].copy()
            plain = torch.nn.functional.interpolate(
                torch.from_numpy(pixels).permute(2, 0, 1)[None], (SIZE, SIZE), mode="bilinear"
            )
            far = max(far, (plain[0].int() - pil).abs().max().item())
    assert 0 < np.mean(differing) < 0.1
    assert two < 5  # of ten million values
    assert far > 20  # negative control


@pytest.mark.parametrize("size", [224, 32])
def test_validation_view_is_that_of_resize_and_center_crop(size):
    for image in [*PHOTOGRAPHS, photograph(301, 301, 4), photograph(333, 256, 5), photograph(40, 601, 6)]:
        published = transforms.Compose(
            [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.ToTensor()]
        )
        levels = (published(image) * 255).round().to(torch.uint8)
        assert torch.equal(center_resize(image, size, "pil"), levels)
        assert (center_resize(image, size, "torch").int() - levels.int()).abs().max() <= 1
        shifted = image.transform(image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 1))
        assert not torch.equal(center_resize(shifted, size, "pil"), levels)  # negative control


@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_arrays_and_pil_images_give_the_same_views_and_are_left_alone(resize):
    image = PHOTOGRAPHS[0]
    array = np.array(image)
    before = array.copy()
    array.flags.writeable = False  # as decoders may give it; torch warns of such memory
    whole = draw(moco_v2(), *image.size, 0, 0, 0)[0]
    whole["top"], whole["left"], whole["height"], whole["width"] = 0, 0, *array.shape[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (whole, *draw(moco_v2(), *image.size, 0, 0, 1)):
            pixels = crop_resize(array, view, SIZE, resize)
            assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
            assert torch.equal(pixels, crop_resize(image, view, SIZE, resize))
        assert torch.equal(center_resize(array, SIZE, resize), center_resize(image, SIZE, resize))
    assert np.array_equal(array, before)


@pytest.mark.parametrize("resize", ["pil", "torch"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_are_written_into_the_slot_they_are_given(resize, layout):
    image = np.array(PHOTOGRAPHS[0])
    view = draw(moco_v2(), 569, 427, 0, 0, 0)[0]
    for function, arguments in (
        (crop_resize, (image, view, 64, resize)),
        (center_resize, (image, 64, resize)),
    ):
        batch = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8).contiguous(memory_format=layout)
        slot = batch[2]
        assert function(*arguments, out=slot) is slot
        assert torch.equal(batch[2], function(*arguments))
        assert (batch[[0, 1, 3]] == 7).all() and not (batch[2] == 7).all()


def test_another_resize_is_refused():
    with pytest.raises(ValueError, match="nearest"):
        crop_resize(PHOTOGRAPHS[0], draw(moco_v2(), 569, 427, 0, 0, 0)[0], SIZE, "nearest")
