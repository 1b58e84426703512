"""moco.photometric against PIL and torchvision themselves, called one image at a time."""

import itertools

import pytest
import torch
from made_views import drawn, photographs, to_pil
from PIL import ImageEnhance, ImageFilter, ImageOps
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision import transforms
from torchvision.transforms import functional

from moco import photometric
from moco.draws import linear_train, moco_v1, moco_v2
from moco.float_pixels import REACH
from moco.photometric import Finish, difference, fastest_finish, seconds, to_device
from moco.pil_exact import MAX_SIGMA, PilExact

CPU = torch.device("cpu")
RECIPES = {"v1": moco_v1(), "v2": moco_v2(), "linear": linear_train()}


def published(pixels, view, recipe):
    """One view finished as the published programs do it: PIL, then ToTensor and Normalize."""
    image = to_pil(pixels)
    if view["gray"] and recipe.gray_first:
        image = transforms.Grayscale(3)(image)
    if view["jitter"]:
        for operation in view["order"]:
            name = ("brightness", "contrast", "saturation", "hue")[operation]
            if name == "hue":
                image = functional.adjust_hue(image, float(view["hue"]))
            else:
                enhance = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
                image = getattr(ImageEnhance, enhance)(image).enhance(float(view[name]))
    if view["gray"] and not recipe.gray_first:
        image = image.convert("L").convert("RGB")
    if view["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(float(view["sigma"])))
    if view["flip"]:
        image = ImageOps.mirror(image)
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return normalise(transforms.ToTensor()(image))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("count", "height", "width"),
    [(4, 224, 224), (12, 96, 96), (48, 32, 32), (16, 24, 61), (8, 2, 3), (4, 1, 1)],
)
def test_exact_is_pil_to_the_bit(name, count, height, width):
    recipe, pixels = RECIPES[name], photographs(count, height, width)
    views = drawn(recipe, count)
    expected = torch.stack([published(*one, recipe) for one in zip(pixels, views, strict=True)])
    finish = Finish(recipe, "exact", CPU)
    assert torch.equal(finish(pixels, to_device(views, CPU)), expected)
    if height < 4:
        return
    others = drawn(recipe, count, seed=1)
    assert not torch.equal(finish(pixels, to_device(others, CPU)), expected)
    for field in ("brightness", "contrast", "saturation", "hue") if recipe.jitter_p else ():
        changed = views.copy()
        changed[field] += 0.01
        assert not torch.equal(finish(pixels, to_device(changed, CPU)), expected), field


def test_every_order_of_the_jitter():
    recipe, orders = moco_v2(), list(itertools.permutations(range(4)))
    views = drawn(recipe, len(orders))
    views["order"], views["jitter"] = orders, True
    pixels = photographs(24, 20, 20)
    expected = torch.stack([published(*one, recipe) for one in zip(pixels, views, strict=True)])
    assert torch.equal(Finish(recipe, "exact", CPU)(pixels, to_device(views, CPU)), expected)


def test_float_is_torchvisions():
    recipe, pixels, views = moco_v2(), photographs(32, 24, 24), drawn(moco_v2(), 32)
    finished = Finish(recipe, "float", CPU)(pixels, to_device(views, CPU))
    for image, view, result in zip(pixels, views, finished, strict=True):
        image = image / 255
        if view["jitter"]:
            for operation in view["order"]:
                name = ("brightness", "contrast", "saturation", "hue")[operation]
                image = getattr(functional, f"adjust_{name}")(image, float(view[name]))
        if view["gray"]:
            image = functional.rgb_to_grayscale(image, 3)
        if view["sigma"]:
            wide = torch.nn.functional.pad(image, [REACH] * 4, "replicate")
            wide = functional.gaussian_blur(wide, 2 * REACH + 1, float(view["sigma"]))
            image = wide[:, REACH:-REACH, REACH:-REACH]
        if view["flip"]:
            image = functional.hflip(image)
        image = functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        torch.testing.assert_close(result, image, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_float_is_near_exact(name):
    recipe, pixels, views = RECIPES[name], photographs(64, 64, 64), drawn(RECIPES[name], 64)
    parameters, to_levels = to_device(views, CPU), 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    exact = Finish(recipe, "exact", CPU)(pixels, parameters)
    finish = Finish(recipe, "float", CPU)
    single = finish(pixels, parameters)
    finish.arithmetic.stored = torch.float16  # as on CUDA
    half = finish(pixels, parameters)
    for finished in (single, half):
        levels = (finished - exact).abs() * to_levels
        assert levels.mean() < 2
        assert 1 < levels.max() < 32
    assert 0 < ((half - single).abs() * to_levels).max() < 2
    others = finish(pixels, to_device(drawn(recipe, 64, seed=1), CPU))
    assert ((others - exact).abs() * to_levels).mean() > 5


@pytest.mark.parametrize("mode", ["exact", "float"])
def test_images_do_not_depend_on_their_batch(mode):
    finish, pixels = Finish(moco_v2(), mode, CPU), photographs(20, 16, 20)  # more than one part
    views = drawn(moco_v2(), 20)
    together = finish(pixels, to_device(views, CPU))
    alone = torch.cat([finish(pixels[i : i + 1], to_device(views[i : i + 1], CPU)) for i in range(20)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0 if mode == "exact" else 1e-5)
    assert not torch.allclose(together[1:], alone[:-1])
    assert finish(pixels[:0], to_device(views[:0], CPU)).shape == (0, 3, 16, 20)


@pytest.mark.parametrize("mode", ["exact", "float"])
def test_nothing_depends_on_the_values_of_tensors(mode):
    """A fake tensor has no values: to read one, as for a branch or a shape, is an error."""
    finish, parameters = Finish(moco_v2(), mode, CPU), to_device(drawn(moco_v2(), 4), CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        pixels = fake.from_tensor(photographs(4, 16, 16))
        assert (
            finish(pixels, {name: fake.from_tensor(p) for name, p in parameters.items()}).shape
            == pixels.shape
        )
        with pytest.raises(DataDependentOutputException):
            pixels.max().item()


def test_fastest_finish(monkeypatch):
    finish, sentence = fastest_finish(moco_v1(), "exact", "cpu")
    assert finish.engine == "plain" and "exact" in sentence
    assert difference(finish) == 0
    finish.arithmetic.hue_below.zero_()
    assert difference(finish) > 0.5

    pytest.importorskip("triton")
    monkeypatch.setattr(photometric, "PilExact", lambda device: PilExact(CPU))
    monkeypatch.setattr(photometric, "difference", lambda finish: 0)
    finish, sentence = fastest_finish(moco_v1(), "exact", "cuda")
    assert finish.engine == "kernels" and "to the bit" in sentence
    monkeypatch.setattr(photometric, "difference", lambda finish: 2)
    finish, sentence = fastest_finish(moco_v1(), "exact", "cuda")
    assert finish.engine == "plain" and "by 2 levels" in sentence
    monkeypatch.setattr(photometric, "difference", lambda finish: 1 / 0)
    finish, sentence = fastest_finish(moco_v1(), "exact", "cuda")
    assert finish.engine == "plain" and "ZeroDivisionError" in sentence


def test_wrong_use_is_refused():
    pixels, parameters = photographs(2, 8, 8), to_device(drawn(moco_v2(), 2), CPU)
    with pytest.raises(ValueError, match="mode"):
        Finish(moco_v2(), "approximate", CPU)
    with pytest.raises(ValueError, match="engine"):
        Finish(moco_v2(), "float", CPU, "kernels")
    finish = Finish(moco_v2(), "exact", CPU)
    with pytest.raises(ValueError, match="uint8"):
        finish(pixels.float(), parameters)
    with pytest.raises(ValueError, match="1 images and 2 views"):
        finish(pixels[:1], parameters)
    views = drawn(moco_v2(), 2)
    views["sigma"] = MAX_SIGMA
    with pytest.raises(ValueError, match="2.45"):
        to_device(views, CPU)
    assert seconds(finish, pixels, parameters, repeats=1) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_on_cuda(name):
    recipe, pixels, views = RECIPES[name], photographs(64, 96, 96), drawn(RECIPES[name], 64)
    cuda, expected = torch.device("cuda"), Finish(recipe, "exact", CPU)(pixels, to_device(views, CPU))
    for engine in ("kernels", "plain"):
        finish, parameters = Finish(recipe, "exact", cuda, engine), to_device(views, cuda)
        on_device = pixels.to(cuda)
        finish(on_device, parameters)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            finished = finish(on_device, to_device(views, cuda))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(finished.cpu(), expected), engine
    assert difference(Finish(recipe, "float", cuda)) < 2
