"""The photometric half of the augmentations on batches: jitter, grayscale, blur, flip, normalisation.

Every image has its own draw (moco.draws). Nothing waits for the device or depends on the values of tensors:
an operation that an image does not get is done to it with parameters that change nothing, or not selected.
"""

import importlib.util
import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch

from moco.draws import VIEW, Recipe
from moco.float_pixels import FloatPixels, gauss_weights
from moco.pil_exact import PilExact, box_weights

# Any order of four operations fits into: blend, hue, blend, blend, hue, blend. For the place of hue in the
# drawn order: the blends that the other three operations take, and which hue is used.
BLENDS = np.array([[1, 2, 3], [0, 1, 2], [0, 1, 3], [0, 1, 2]])
HUES = np.array([0, 0, 1, 1])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbers in VIEW's order

PLAIN_BATCH = 16  # images at a time without compilation: its planes of float32 stay in memory one by one


@dataclass
class Finish:
    """Finishes cropped views of one `recipe` on `device`, each after what was drawn for it.

    mode: "exact" gives PIL's pixels to the bit, "float" torchvision's float formulas. engine: "plain" for
    torch's operations one by one; "compile" for the same by torch.compile, with a minute or more at the first
    call; "kernels" for moco.pil_triton, which has mode "exact" only.
    """

    recipe: Recipe
    mode: str
    device: torch.device
    engine: str = "plain"

    def __post_init__(self):
        if self.mode not in ("exact", "float"):
            raise ValueError(f'mode is "exact" or "float", not {self.mode!r}')
        if self.engine not in ("plain", "compile") and (self.mode, self.engine) != ("exact", "kernels"):
            raise ValueError(f"there is no engine {self.engine!r} for mode {self.mode!r}")
        self.arithmetic = (PilExact if self.mode == "exact" else FloatPixels)(self.device)
        self._run = {"plain": _in_parts, "kernels": _by_kernels}.get(self.engine)
        if self.engine == "compile":
            self._run = torch.compile(_finish, fullgraph=True, dynamic=False)

    def __call__(self, pixels, views):
        """float32 (N, 3, H, W) from uint8 (N, 3, H, W) with any strides on the device; views: to_device's."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be uint8 (N, 3, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
        if len(pixels) != views["flip"].shape[-1]:
            raise ValueError(f"there are {len(pixels)} images and {views['flip'].shape[-1]} views")
        return self._run(self.arithmetic, self.recipe, pixels.contiguous(), views)


def fastest_finish(recipe, mode, device):
    """The Finish to use on `device`, and a sentence for the start of a run that says what it is.

    The kernels' first result is compared with the CPU's; where they fail or differ they are not used.
    """
    device = torch.device(device)
    plain = Finish(recipe, mode, device), f"photometric half: {mode}, torch's operations on {device}"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return plain
    if mode == "float":
        return Finish(recipe, mode, device, "compile"), f"photometric half: {mode}, compiled for {device}"
    finish = Finish(recipe, mode, device, "kernels")
    try:
        levels = difference(finish)
        problem = f"differ from the CPU's pixels by {levels:.3g} levels" if levels else None
    except Exception as error:  # whatever a compiler or a driver raises, there is a way to go on
        problem = f"fail ({type(error).__name__}: {error})".splitlines()[0]
    if problem:
        return plain[0], f"{plain[1]}, which is slow: its kernels {problem}"
    return finish, f"photometric half: {mode}, kernels on {device}, checked: the CPU's pixels to the bit"


def difference(finish):
    """The largest difference in levels (of 255) between `finish` and the CPU's, for 24 made views: a float.

    They have every order of the jitter, some a gray or a blur, and pixels of all colours.
    """
    draw = np.random.default_rng(0)
    views = np.zeros(24, VIEW)
    views["order"] = list(itertools.permutations(range(4)))
    for name in ("brightness", "contrast", "saturation"):
        views[name] = draw.uniform(0.6, 1.4, 24)
    views["hue"], views["sigma"] = draw.uniform(-0.4, 0.4, 24), draw.uniform(0.1, 2, 24)
    views["jitter"] = True
    views["gray"][::4], views["flip"][::2], views["sigma"][::3] = True, True, 0
    pixels = torch.from_numpy(draw.integers(0, 256, (24, 3, 72, 64), np.uint8))
    here = Finish(finish.recipe, finish.mode, torch.device("cpu"))(pixels, to_device(views, "cpu"))
    there = finish(pixels.to(finish.device), to_device(views, finish.device)).cpu()
    return float((here - there).abs().max() * 255 * 0.229)  # 0.229: the largest std of a channel


def to_device(views, device):
    """What Finish needs of `views`, (N,) of VIEW: a dict of tensors (..., N) on `device`, sent in one piece.

    The copy is asynchronous. Raises ValueError for a sigma that the blur does not serve.
    """
    parts = _parameters(views)
    rows = {name: np.atleast_2d(part) for name, part in parts.items()}
    packed = torch.from_numpy(np.concatenate([part.view(np.int32) for part in rows.values()]))
    if torch.device(device).type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = packed.split([len(part) for part in rows.values()])
    return {
        name: (piece.view(torch.float32) if part.dtype == np.float32 else piece).view(part.shape)
        for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }


def seconds(finish, pixels, views, repeats=10):
    """The median time of finish(pixels, views), over `repeats` calls after one that compiles."""
    finish(pixels, views)
    times = []
    for _ in range(repeats):
        _wait(pixels.device)
        start = time.perf_counter()
        finish(pixels, views)
        _wait(pixels.device)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parameters(views):
    """Finish's parameters as int32 and float32 arrays with a column per view, from `views`, (N,) of VIEW."""
    count = len(views)
    place = np.argsort(views["order"], axis=1)  # of each operation
    jitter = views["jitter"]
    kinds, factors = np.zeros((4, count), np.int32), np.ones((4, count), np.float32)
    for kind, name in ((BRIGHTNESS, "brightness"), (CONTRAST, "contrast"), (SATURATION, "saturation")):
        rank = place[:, kind] - (place[:, kind] > place[:, HUE])  # among the blends
        blend = BLENDS[place[:, HUE], rank], np.arange(count)
        kinds[blend], factors[blend] = kind, np.where(jitter, views[name], 1)
    return {
        "flip": views["flip"].astype(np.int32),
        "gray": views["gray"].astype(np.int32),
        "kind": kinds,
        "factor": factors,  # 1 changes nothing, whatever the kind
        "turned": np.stack([jitter & (HUES[place[:, HUE]] == hue) for hue in (0, 1)]).astype(np.int32),
        "hue": views["hue"].astype(np.float32),
        # torchvision's adjust_hue: in double precision, rounded towards zero, modulo 256
        "hue_byte": (views["hue"].astype(np.float64) * 255).astype(np.int32) % 256,
        "box": box_weights(views["sigma"]),
        "gauss": gauss_weights(views["sigma"]),
    }


def _in_parts(arithmetic, recipe, pixels, views):
    finished = torch.empty(pixels.shape, device=pixels.device)
    for start in range(0, len(pixels), PLAIN_BATCH):
        part = slice(start, start + PLAIN_BATCH)
        some = {name: values[..., part] for name, values in views.items()}
        finished[part] = _finish(arithmetic, recipe, pixels[part], some)
    return finished


def _by_kernels(arithmetic, recipe, pixels, views):
    from moco import pil_triton  # here, because not every build of torch comes with Triton

    return pil_triton.finish(arithmetic, recipe, pixels, views)


def _finish(arithmetic, recipe, pixels, views):
    """The published order, but the flip first, where it moves bytes: it commutes with all the rest."""
    flip = views["flip"][:, None, None, None] > 0
    planes = arithmetic.load(torch.where(flip, pixels.flip(-1), pixels)).unbind(1)
    if recipe.gray_p > 0 and recipe.gray_first:
        planes = _grayed(arithmetic, planes, views)
    if recipe.jitter_p > 0:
        planes = _jittered(arithmetic, planes, views)
    if recipe.gray_p > 0 and not recipe.gray_first:
        planes = _grayed(arithmetic, planes, views)
    pixels = torch.stack(planes, 1)
    if recipe.blur_p > 0:
        pixels = arithmetic.blur(pixels, views)
    return arithmetic.normalise(pixels)


def _grayed(arithmetic, planes, views):
    return _select(views["gray"], [arithmetic.gray(planes)] * 3, planes)


def _jittered(arithmetic, planes, views):
    for blend, hue in ((0, 0), (1, None), (2, 1), (3, None)):
        planes = _blended(arithmetic, planes, views["kind"][blend], views["factor"][blend])
        if hue is not None:
            planes = _select(views["turned"][hue], arithmetic.turn_hue(planes, views), planes)
    return planes


def _blended(arithmetic, planes, kind, factor):
    """Brightness, contrast and saturation: blends with black, with the mean gray, with the gray image."""
    kind, factor = kind[:, None, None], factor[:, None, None]
    gray = arithmetic.gray(planes)
    other = torch.where(kind == SATURATION, gray, torch.where(kind == CONTRAST, arithmetic.mean(gray), 0))
    return [arithmetic.blend(plane, other, factor) for plane in planes]


def _select(mask, yes, no):
    mask = mask[:, None, None] > 0
    return [torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)]
