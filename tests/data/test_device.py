"""The color operations in batches against PIL's, called one image at a time."""

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from made_views import RECIPES, drawn, from_pil, photographs, published, to_pil
from PIL import Image, ImageEnhance, ImageFilter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision import transforms

from moco.data import device
from moco.data.augment import moco_v1, moco_v2
from moco.data.device import MAX_SIGMA, DeviceAugment, normalize
from moco.data.ring import Batch

CPU = torch.device("cpu")
HUES_BELOW = device._hues_below(CPU)


def on_cpu(recipe):
    return DeviceAugment(recipe, CPU, photometric=True)


def published_views(pixels, records, name):
    return torch.stack([published(to_pil(p), r, name) for p, r in zip(pixels, records, strict=True)])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("count", "height", "width"), [(4, 224, 224), (48, 32, 32), (16, 24, 61), (8, 2, 3), (4, 1, 1)]
)
def test_views_are_pils_to_the_bit(name, count, height, width):
    recipe, pixels = RECIPES[name], photographs(count, height, width)
    records = drawn(recipe, count)
    if count == 48 and name == "v2":
        records["order"], records["jitter"] = list(itertools.permutations(range(4))) * 2, True
    augment, expected = on_cpu(recipe), published_views(pixels, records, name)
    assert torch.equal(augment.apply(pixels, records), expected)
    if height < 4:
        return
    assert not torch.equal(augment.apply(pixels, drawn(recipe, count, seed=1)), expected)
    for field in ("brightness", "contrast", "saturation", "hue") if recipe.jitter_p else ():
        changed = records.copy()
        changed[field] += 0.01
        assert not torch.equal(augment.apply(pixels, changed), expected), field


def test_batches_of_views():
    pixels, records = photographs(6, 16, 16), drawn(moco_v2(), 6)
    batch = Batch(pixels.unflatten(0, (2, 3)), torch.zeros(3), records.reshape(2, 3), None)
    q, k = on_cpu(moco_v2())(batch)
    assert torch.equal(torch.cat([q, k]), on_cpu(moco_v2()).apply(pixels, records))
    only_normalized = DeviceAugment(moco_v2(), CPU, photometric=False)(batch)
    assert torch.equal(torch.cat(only_normalized), normalize(pixels))
    assert not torch.equal(only_normalized[0], q)


def test_images_do_not_depend_on_their_batch():
    augment, pixels, records = on_cpu(moco_v2()), photographs(20, 16, 20), drawn(moco_v2(), 20)
    together = augment.apply(pixels, records)  # more than one chunk
    alone = torch.cat([augment.apply(pixels[i : i + 1], records[i : i + 1]) for i in range(20)])
    assert torch.equal(together, alone)
    assert not torch.allclose(together[1:], alone[:-1])


def test_nothing_depends_on_the_values_of_tensors():
    """A fake tensor has no values: to read one, as for a branch or a shape, is an error."""
    augment, records = on_cpu(moco_v2()), drawn(moco_v2(), 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        pixels = fake.from_tensor(photographs(4, 16, 16))
        assert augment.apply(pixels, records).shape == pixels.shape
        with pytest.raises(DataDependentOutputException):
            pixels.max().item()


def test_a_sigma_that_is_too_large_is_refused():
    records = drawn(moco_v2(), 2)
    records["sigma"] = MAX_SIGMA
    with pytest.raises(ValueError, match="2.45"):
        on_cpu(moco_v2()).apply(photographs(2, 8, 8), records)


def test_compiled_operations_are_used_when_they_are_equal_to_the_cpus(monkeypatch):
    assert str(DeviceAugment(moco_v1(), "cpu", False)) == "colors and blur: PIL, in the workers"
    assert "in batches on cpu" in str(on_cpu(moco_v1()))
    monkeypatch.setattr(torch, "compile", lambda function, **options: "compiled")
    for difference, used, said in (
        (lambda *_: 0.0, "compiled", "in batches on cuda, compiled; equal"),
        (lambda *_: 2.0, device._apply_in_chunks, "uncompiled .* differ from the CPU's by 2 levels"),
        (lambda *_: 1 / 0, device._apply_in_chunks, r"cannot be computed \(ZeroDivisionError: division by"),
    ):
        monkeypatch.setattr(DeviceAugment, "difference", difference)
        augment = DeviceAugment(moco_v1(), "cuda", True)
        assert augment._apply == used
        assert re.search(said, str(augment))


def test_a_device_without_enough_memory_is_not_taken_for_one_without_a_compiler(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: "compiled")
    monkeypatch.setattr(DeviceAugment, "difference", full)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceAugment(moco_v1(), "cuda", True)


def test_the_comparison_finds_a_difference():
    augment = on_cpu(moco_v1())
    assert augment.difference() == augment.difference(10, 20) == augment.difference(60, 20) == 0
    real = augment._apply
    augment._apply = lambda recipe, normalized, below, *rest: real(recipe, normalized, 0 * below, *rest)
    assert augment.difference() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_operations_compile_into_one_graph(name):
    """Up to where code for a device is generated from it."""
    recipe, pixels, records = RECIPES[name], photographs(8, 20, 20), drawn(RECIPES[name], 8)
    augment = on_cpu(recipe)
    expected = augment.apply(pixels, records)
    augment._apply = torch.compile(device._apply, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(augment.apply(pixels, records), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a compiler")
def test_compilation_keeps_the_bits():
    """A blend and a blur; all of it takes minutes, and hues bear any rounding (test_hue_of_colors)."""

    def some(normalized, pixels, parameters):
        planes = device._blended(pixels.unbind(1), parameters["kind"][1], parameters["factor"][1])
        return device._looked_up(normalized, device._blurred(torch.stack(planes, 1), parameters["box"]))

    records = drawn(moco_v2(), 16)
    records["order"] = [(1, 2, 0, 3), (0, 1, 2, 3)] * 8
    parameters = device._sent(device._parameters(records), CPU)
    arguments = device._normalized_bytes(CPU), photographs(16, 32, 32), parameters
    compiled = torch.compile(some, fullgraph=True, dynamic=False, options={"cpp.simdlen": 1})  # in less time
    assert torch.equal(compiled(*arguments), some(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_on_cuda(name):
    recipe, pixels, records = RECIPES[name], photographs(64, 96, 96), drawn(RECIPES[name], 64)
    augment, on_device = DeviceAugment(recipe, "cuda", True, (64, 96)), pixels.cuda()
    assert ", compiled" in str(augment)
    augment.apply(on_device, records)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views, normalized = augment.apply(on_device, records), normalize(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(views.cpu(), on_cpu(recipe).apply(pixels, records))
    assert torch.equal(normalized.cpu(), normalize(pixels))


# Operation by operation, over all their arguments.


def test_blends_of_all_pairs_of_bytes():
    factors = [0, 1e-3, 0.99999994, 1, 1.0000001, 2.7, *np.linspace(0.6, 1.4, 41)]
    other, plane = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    images, fused_differs = [Image.fromarray(p.numpy()) for p in (other, plane)], 0
    for factor in torch.tensor(factors, dtype=torch.float32):
        expected = torch.from_numpy(np.array(Image.blend(*images, factor.item())))
        assert torch.equal(device._blend(plane, other, factor), expected), factor
        fused = (other + factor.double() * (plane.int() - other.int())).float().clamp(0, 255).to(torch.uint8)
        fused_differs += int((fused != expected).sum())
    assert fused_differs  # negative control: one rounding instead of two, as by an FMA


def colors(step):
    """All values of the first two channels with every step-th of the third: uint8 (1, 3, 256, 256 n)."""
    grid = torch.meshgrid(torch.arange(256), torch.arange(256), torch.arange(0, 256, step), indexing="ij")
    return torch.stack(grid).flatten(2)[None].to(torch.uint8)


def test_gray_and_mean_are_pils():
    pixels = colors(5)
    gray = device._gray(pixels.unbind(1))
    assert np.array_equal(gray[0], np.array(to_pil(pixels[0]).convert("L")))
    half = [[[10, 11], [11, 10]], [[10, 10], [11, 10]], [[255, 255], [255, 255]]]
    assert device._mean(torch.tensor(half, dtype=torch.uint8)).flatten().tolist() == [11, 10, 255]
    levels = photographs(16, 9, 7)[:, 0]
    contrasts = [ImageEnhance.Contrast(Image.fromarray(level.numpy())) for level in levels]
    assert device._mean(levels).flatten().tolist() == [c.degenerate.getpixel((0, 0)) for c in contrasts]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_hue_of_colors(precision):
    """In float64 too, with nothing rounded as in float32: so no device's way to divide or to fuse matters."""
    pixels = colors(5)
    planes = [plane.to(precision) for plane in pixels.unbind(1)]
    hsv = from_pil(to_pil(pixels[0]).convert("HSV"))
    assert torch.equal(torch.cat(device._to_hsv(*planes, HUES_BELOW)).to(torch.uint8), hsv)
    assert not torch.equal(torch.cat(device._to_hsv(*planes, 0 * HUES_BELOW)).to(torch.uint8), hsv)
    back = Image.fromarray(np.array(to_pil(pixels[0])), "HSV").convert("RGB")  # the same bytes, taken as HSV
    assert torch.equal(torch.cat(device._to_rgb(*planes)), from_pil(back))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (3, 7), (24, 24)])
def test_blur_is_pils(height, width):
    sigmas = np.concatenate([[0, 1e-4], np.linspace(0.1, 2, 77), [2.44]]).astype(np.float32)
    pixels = torch.randint(0, 256, (len(sigmas), 3, height, width), dtype=torch.uint8)
    pixels[::5] = 255
    blurred = device._blurred(pixels, torch.from_numpy(device._box_weights(sigmas)))
    for image, sigma, result in zip(pixels, sigmas, blurred, strict=True):
        expected = to_pil(image).filter(ImageFilter.GaussianBlur(float(sigma)))
        assert torch.equal(result, from_pil(expected)), sigma
    if height * width > 1:
        other = device._blurred(pixels, torch.from_numpy(device._box_weights(sigmas[::-1].copy())))
        assert not torch.equal(blurred, other)


def test_normalize_has_the_bits_of_to_tensor_and_normalize():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)  # every level
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    for form in (
        normalize,
        lambda pixels: device._looked_up(device._normalized_bytes(CPU), pixels),
    ):  # CUDA's
        views = form(pixels.expand(5, 2, -1, -1, -1))
        assert views.dtype == torch.float32 and views.is_contiguous() and torch.equal(views[3, 1], expected)
    # Negative control: the same formula with other roundings has other bits.
    scaled = (pixels - 255 * torch.tensor(mean).view(3, 1, 1)) / (255 * torch.tensor(std).view(3, 1, 1))
    assert torch.allclose(scaled, expected, atol=1e-5) and not torch.equal(scaled, expected)
