"""The same seed gives the same pixels on every path, from files of real photographs to the encoder."""

import shutil
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageFilter
from test_data import batches_of
from torchvision import transforms
from torchvision.transforms import functional

from moco.draws import draw, linear_train, moco_v1, moco_v2
from moco.loader import IMAGENET_MEAN, IMAGENET_STD

RECIPES = {"v1": moco_v1(), "v2": moco_v2(), "linear": linear_train()}
SIZE, SEED, EPOCH = 224, 3, 1


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A training set of scikit-learn's two photographs, JPEG files of 640 x 427, four times each."""
    folder = tmp_path_factory.mktemp("photographs") / "train"
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            source = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
            shutil.copy(source, folder / name / f"{number}.jpg")
    return folder.parent


def loaded(photographs, seed=SEED, **options):
    """(q, k, targets) of the only batch."""
    return batches_of(photographs, 0, seed, EPOCH, image_size=SIZE, **options)[0]


def published(path, view, recipe):
    """torchvision's own operations on PIL images, with the numbers that were drawn."""
    image = Image.open(path).convert("RGB")
    box = (int(view[name]) for name in ("top", "left", "height", "width"))
    image = functional.resized_crop(image, *box, [SIZE, SIZE])
    gray = transforms.Grayscale(3) if view["gray"] else lambda image: image
    image = gray(image) if recipe.gray_first else image
    for operation in view["order"] if view["jitter"] else ():
        name = ("brightness", "contrast", "saturation", "hue")[operation]
        image = getattr(functional, f"adjust_{name}")(image, float(view[name]))
    image = image if recipe.gray_first else gray(image)
    if view["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(float(view["sigma"])))
    image = functional.hflip(image) if view["flip"] else image
    return functional.normalize(functional.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", RECIPES)
def test_all_paths_give_the_published_pixels(photographs, name):
    recipe = RECIPES[name]
    *off, targets = loaded(photographs, recipe=recipe)
    *exact, _ = loaded(photographs, recipe=recipe, device_aug="exact")
    assert torch.equal(torch.stack(off), torch.stack(exact))

    paths = sorted(photographs.glob("train/*/*.jpg"))
    expected = [
        [published(path, view, recipe) for view in draw(recipe, 640, 427, SEED, EPOCH, index)]
        for index, path in enumerate(paths)
    ]
    found = 0
    for sample in zip(*off, strict=True):
        found += any(all(map(torch.equal, sample, views)) for views in expected)
    assert found == len(paths) == 8
    assert sorted(targets.tolist()) == [0] * 4 + [1] * 4

    other = loaded(photographs, recipe=recipe, device_aug="exact", seed=SEED + 1)
    assert not torch.equal(torch.stack(off), torch.stack(list(other[:2])))


@pytest.mark.parametrize("name", RECIPES)
def test_with_torchs_resize_the_paths_agree_too_and_float_is_near(photographs, name):
    off, exact, single = (
        torch.stack(loaded(photographs, recipe=RECIPES[name], resize="torch", device_aug=mode)[:2])
        for mode in ("off", "exact", "float")
    )
    assert torch.equal(off, exact)
    levels = (single - exact).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    assert levels.mean() < 2 and levels.max() < 32
