"""moco.pil_exact against PIL, operation by operation, and its kernels against it."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_views import drawn, from_pil, photographs, to_pil
from PIL import Image, ImageEnhance, ImageFilter
from torchvision.transforms import functional

from moco import photometric
from moco.draws import VIEW, linear_train, moco_v1, moco_v2
from moco.photometric import Finish, to_device
from moco.pil_exact import PilExact, _to_rgb

CPU = torch.device("cpu")


@pytest.mark.parametrize("factor", [0, 1e-3, 0.6, 0.7, 0.99999994, 1, 1.0000001, 1.3, 1.4, 2.7, "random"])
def test_blend_of_all_pairs_of_bytes(factor):
    if factor == "random":
        factor = np.random.default_rng(0).uniform(0.6, 1.4)
    factor = torch.tensor(factor, dtype=torch.float32)
    other, plane = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    expected = np.array(Image.blend(*(Image.fromarray(p.numpy()) for p in (other, plane)), factor.item()))
    assert np.array_equal(PilExact(CPU).blend(plane, other, factor), expected)


def test_blend_needs_its_two_roundings():
    """What an FMA would give differs somewhere: the test above can tell."""
    other, plane = torch.meshgrid(*[torch.arange(256)] * 2, indexing="ij")
    different = 0
    for factor in torch.linspace(0.6, 1.4, 41):
        once = (other + factor.double() * (plane - other)).float().clamp(0, 255).to(torch.uint8)
        different += int((once != PilExact(CPU).blend(plane, other, factor)).sum())
    assert 0 < different < 0.01 * 41 * 256 * 256


def colours(step):
    """All values of the first two channels with every step-th of the third: uint8 (1, 3, 256, 256 n)."""
    grid = torch.meshgrid(torch.arange(256), torch.arange(256), torch.arange(0, 256, step), indexing="ij")
    return torch.stack(grid).flatten(2)[None].to(torch.uint8)


def test_gray_and_mean_are_pils():
    pixels = colours(5)
    gray = PilExact(CPU).gray(pixels.unbind(1))
    assert np.array_equal(gray[0], np.array(to_pil(pixels[0]).convert("L")))
    half = torch.tensor(
        [[[10, 11], [11, 10]], [[10, 10], [11, 10]], [[255, 255], [255, 255]]], dtype=torch.uint8
    )
    assert PilExact(CPU).mean(half).flatten().tolist() == [11, 10, 255]
    levels = photographs(16, 9, 7)[:, 0]
    contrasts = [ImageEnhance.Contrast(Image.fromarray(level.numpy())) for level in levels]
    assert PilExact(CPU).mean(levels).flatten().tolist() == [c.degenerate.getpixel((0, 0)) for c in contrasts]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_hue_of_colours(precision):
    """In float64 too, with nothing rounded as in float32: so no device's way to divide or to fuse matters."""
    exact, pixels = PilExact(CPU), colours(5)
    hsv = to_pil(pixels[0]).convert("HSV")
    planes = exact._to_hsv(*(plane.to(precision) for plane in pixels.unbind(1)))
    assert torch.equal(torch.cat(planes).to(torch.uint8), from_pil(hsv))
    exact.hue_below.zero_()
    planes = exact._to_hsv(*(plane.to(precision) for plane in pixels.unbind(1)))
    assert not torch.equal(torch.cat(planes).to(torch.uint8), from_pil(hsv))

    back = Image.fromarray(np.array(to_pil(pixels[0])), "HSV").convert("RGB")  # the same bytes, taken as HSV
    rgb = _to_rgb(*(plane.to(precision) for plane in pixels.unbind(1)))
    assert torch.equal(torch.cat(rgb), from_pil(back))


@pytest.mark.parametrize("hue", [-0.5, -0.4, -0.1, -1e-3, 0, 1e-3, 0.1, 0.2, 0.4, 0.5])
def test_hue_turned_by(hue):
    view = np.zeros(1, VIEW)
    view["hue"], pixels = hue, photographs(4, 30, 30)
    turned = PilExact(CPU).turn_hue(pixels.unbind(1), to_device(view.repeat(4), CPU))
    expected = [from_pil(functional.adjust_hue(to_pil(image), float(view["hue"][0]))) for image in pixels]
    assert torch.equal(torch.stack(turned, 1), torch.stack(expected))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (2, 2), (3, 7), (24, 24)])
def test_blur_is_pils(height, width):
    sigmas = np.concatenate([[0, 1e-4], np.linspace(0.1, 2, 77), [2.44]]).astype(np.float32)
    views = np.zeros(len(sigmas), VIEW)
    views["sigma"] = sigmas
    pixels = torch.randint(0, 256, (len(sigmas), 3, height, width), dtype=torch.uint8)
    pixels[::5] = 255
    blurred = PilExact(CPU).blur(pixels, to_device(views, CPU))
    for image, sigma, result in zip(pixels, sigmas, blurred, strict=True):
        expected = to_pil(image).filter(ImageFilter.GaussianBlur(float(sigma)))
        assert torch.equal(result, from_pil(expected)), sigma
    if height * width > 1:
        assert not torch.equal(blurred, PilExact(CPU).blur(pixels, to_device(views[::-1].copy(), CPU)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a compiler")
def test_compilation_keeps_the_bits():
    """A blend and a blur; the whole takes minutes, and hues bear any rounding (test_hue_of_colours)."""

    def part(exact, pixels, views):
        planes = photometric._blended(exact, pixels.unbind(1), views["kind"][1], views["factor"][1])
        return exact.normalise(exact.blur(torch.stack(planes, 1), views))

    views = drawn(moco_v2(), 16)
    views["order"] = [(1, 2, 0, 3), (0, 1, 2, 3)] * 8
    arguments = PilExact(CPU), photographs(16, 32, 32), to_device(views, CPU)
    compiled = torch.compile(part, fullgraph=True, dynamic=False, options={"cpp.simdlen": 1})  # in less time
    assert torch.equal(compiled(*arguments), part(*arguments))


INTERPRETED = """
import sys, torch
from moco import draws, pil_exact, pil_triton
torch.set_num_threads(1)
inputs, results = torch.load(sys.argv[1], weights_only=True), []
for name, pixels, parameters in inputs:
    recipe = getattr(draws, name)()
    results.append(pil_triton.finish(pil_exact.PilExact(pixels.device), recipe, pixels, parameters))
torch.save(results, sys.argv[2])
"""


def test_kernels_keep_the_bits(tmp_path):
    """On the CPU, in Triton's interpreter, which must be chosen before Triton is imported."""
    triton = pytest.importorskip("triton")
    if (
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
        and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    ):
        pytest.skip("the interpreter of this Triton takes arrays of one number for numbers, as NumPy did")
    inputs, expected = [], []
    sizes = [(moco_v1, 8, 17, 20), (moco_v2, 8, 17, 20), (linear_train, 4, 17, 20)]
    for recipe, count, height, width in (*sizes, (moco_v2, 6, 3, 2), (moco_v2, 2, 2, 1100)):
        pixels, parameters = photographs(count, height, width), to_device(drawn(recipe(), count), CPU)
        copies = {name: part.clone() for name, part in parameters.items()}
        inputs.append((recipe.__name__, pixels, copies))
        expected.append(Finish(recipe(), "exact", CPU)(pixels, parameters))
    torch.save(inputs, tmp_path / "inputs")
    words = [sys.executable, "-c", INTERPRETED, tmp_path / "inputs", tmp_path / "results"]
    subprocess.run(
        words, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1]
    )
    results = torch.load(tmp_path / "results", weights_only=True)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0], expected[1])


def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """Without one, because the interpreter accepts more than the compiler does, and fuses nothing.

    The compiler fuses products with sums where it can; in a blend it must find none.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from moco import pil_triton

    types = dict.fromkeys(("pixels", "out", "plane", "scratch"), "*u8") | {"count": "i32", "size": "i32"}
    types |= dict.fromkeys(("factor", "hue_below", "finished", "normalised"), "*fp32")
    jitter = {"JITTER": True, "GRAY": True, "GRAY_FIRST": False, "BLOCK": 1024}
    blur = {"BLUR": True, "HEIGHT": 224, "WIDTH": 224, "LANES": 256, "ROWS": 4}
    fused = set()
    for kernel, constants in ((pil_triton._jitter, jitter), (pil_triton._blur_and_normalise, blur)):
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*i32") for name in kernel.arg_names
        }
        compiled = compile(
            ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)
        )
        assert len(compiled.asm["cubin"]) > 1000
        fused |= lines_with(compiled.asm["ptx"], "fma.rn.f32")
    lines, start = inspect.getsourcelines(pil_triton._blend.fn)
    assert fused and not fused & set(range(start, start + len(lines)))


def lines_with(ptx, instruction):
    """The lines of the source that became `instruction`, as PTX's .loc directives tell."""
    line, lines = None, set()
    for word in ptx.splitlines():
        if word.strip().startswith(".loc"):
            line = int(word.split()[2])
        elif instruction in word:
            lines.add(line)
    return lines
