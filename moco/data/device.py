"""The color operations, blur, flip and normalization in batches on a device, equal to PIL's to the bit.

Every view has its own draw (moco.data.augment). Nothing waits for the device or depends on the values of
tensors: an operation that a view does not get is applied with parameters that change nothing, or its result
is not selected.

Sources: Pillow's src/libImaging (Blend.c, BoxBlur.c, Convert.c) and ImageEnhance.py, as built for x86-64.
Compilers for GPUs round a product and a sum once instead of twice (FMA) and divide inexactly. So numbers are
integers below 2^24, which float32 holds and adds exactly; a quotient is only ever rounded down, after half a
unit in its numerator has moved it away from the integers by more than a division's error.
"""

import functools
import itertools

import numpy as np
import torch
from PIL import Image

from moco.data.augment import VIEW
from moco.errors import first_line
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.shuffle import to_device

# Any order of four operations fits into: blend, hue, blend, blend, hue, blend. By the place of hue in the
# drawn order: the blends that the other three operations are, and which of the two hues is used.
BLENDS = np.array([[1, 2, 3], [0, 1, 2], [0, 1, 3], [0, 1, 2]])
HUES = np.array([0, 0, 1, 1])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbers in VIEW's order

# The compiler's limit on how many operations it fuses: by default it would keep the box filters' int32 sums
# in memory; so each filter reads and writes bytes, 3.1 instead of 11.2 GB for 1,024 views of 224 px. Where a
# version of the compiler fails with this limit, its own is used.
INDUCTOR = {"realize_opcount_threshold": 1000}
EAGER_BATCH = 16  # views at a time without compilation: their planes of float32 stay in the processor's cache
REACH = 2  # pixels that one box filter takes on either side; enough for every sigma below MAX_SIGMA
MAX_SIGMA = 6**0.5  # from here on BoxBlur.c's boxes have an integer radius of 2


class DeviceAugment:
    """Turns the pixels of a Batch (moco.data.ring) into views for the encoders, on `device`.

    recipe: a moco.data.augment.Recipe. photometric: apply jitter, grayscale, blur and flip as the batch's
    records say; without it the workers have done that, and only normalization is left. batch_shape: the
    number of views in a batch and the pixels of a side, for which the operations are compiled here on CUDA.
    That takes a minute. They run uncompiled if compilation fails or the pixels of generated views differ from
    the CPU's. str() is a line about it for the start of a run.
    """

    def __init__(self, recipe, device, photometric, batch_shape=(24, 64)):
        self.recipe, self.device, self.photometric = recipe, torch.device(device), photometric
        self._apply = _apply_in_chunks
        if not photometric:
            self._line = "colors and blur: PIL, in the workers"
            return
        self._line = f"colors and blur: PIL's pixels, in batches on {device}"
        if self.device.type == "cuda":
            fault = self._compile(INDUCTOR, batch_shape) and self._compile({}, batch_shape)
            if fault:
                self._apply = _apply_in_chunks
                self._line += f", uncompiled and so slow: the compiled operations' pixels {fault}"
            else:
                self._line += ", compiled; equal to the CPU's on generated views"

    def _compile(self, options, batch_shape):
        """Compile the operations and look at their pixels; what is wrong with them, or None."""
        try:
            self._apply = torch.compile(_apply, fullgraph=True, dynamic=False, options=options)
            levels = self.difference(*batch_shape)
            return f"differ from the CPU's by {levels:.3g} levels" if levels else None
        except torch.OutOfMemoryError:  # then a step does not fit either
            raise
        except Exception as error:  # whatever a compiler or a driver raises, the run continues without
            needs = "they need Triton and a C compiler (apt install gcc)"
            return f"cannot be computed ({type(error).__name__}: {first_line(error)}); {needs}"

    def __str__(self):
        return self._line

    def __call__(self, batch):
        """The views of a Batch: a list of float32 N x 3 x S x S on the device, normalized."""
        if not self.photometric:
            return [normalize(pixels) for pixels in batch.pixels]
        views, n = batch.pixels.shape[:2]
        together = self.apply(batch.pixels.flatten(0, 1), batch.records.reshape(-1))
        return list(together.unflatten(0, (views, n)))

    def apply(self, pixels, records):
        """The same for views in one tensor: float32 (N, 3, H, W) from uint8 (N, 3, H, W) on the device.

        records: what was drawn for them, (N,) of VIEW. Raises ValueError for a sigma of MAX_SIGMA or more.
        """
        parameters = _sent(_parameters(records), self.device)
        tables = _normalized_bytes(self.device), _hues_below(self.device)
        return self._apply(self.recipe, *tables, pixels.contiguous(), parameters)

    def difference(self, count=24, size=64):
        """The largest difference in levels (of 255) from the CPU's pixels, for `count` generated views.

        Of size x size pixels. The first 24 are compared, with every order of the jitter, some gray or a blur,
        and pixels of all colors; the others repeat them.
        """
        rng = np.random.default_rng(0)
        records = np.zeros(24, VIEW)
        records["order"] = list(itertools.permutations(range(4)))
        for name in ("brightness", "contrast", "saturation"):
            records[name] = rng.uniform(0.6, 1.4, 24)
        records["hue"], records["sigma"] = rng.uniform(-0.4, 0.4, 24), rng.uniform(0.1, 2, 24)
        records["jitter"] = True
        records["gray"][::4], records["flip"][::2], records["sigma"][::3] = True, True, 0
        pixels = torch.from_numpy(rng.integers(0, 256, (24, 3, size, size), np.uint8))
        on_cpu = DeviceAugment(self.recipe, "cpu", True).apply(pixels, records)
        rows = np.arange(count) % 24
        here = self.apply(pixels[rows].to(self.device), records[rows])[:24].cpu()
        return float((on_cpu[: len(here)] - here).abs().max() * 255 * 0.229)  # 0.229: a channel's largest std


def normalize(pixels):
    """(x / 255 - mean) / std of uint8 (..., 3, H, W) with any strides: float32, contiguous, on their device.

    To the bit what torchvision's ToTensor and Normalize give on a CPU, on every device.
    """
    if pixels.device.type == "cuda":  # where a division by a number multiplies by its reciprocal
        return _looked_up(_normalized_bytes(pixels.device), pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    levels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return levels.div_(255).sub_(mean).div_(std)


def _parameters(records):
    """The operations' parameters from `records`, (N,) of VIEW: int32 and float32 arrays (..., N) by name."""
    count = len(records)
    place = np.argsort(records["order"], axis=1)  # of each operation
    jitter = records["jitter"]
    kinds, factors = np.zeros((4, count), np.int32), np.ones((4, count), np.float32)
    for kind, name in ((BRIGHTNESS, "brightness"), (CONTRAST, "contrast"), (SATURATION, "saturation")):
        rank = place[:, kind] - (place[:, kind] > place[:, HUE])  # among the blends
        blend = BLENDS[place[:, HUE], rank], np.arange(count)
        kinds[blend], factors[blend] = kind, np.where(jitter, records[name], 1)
    return {
        "flip": records["flip"].astype(np.int32),
        "gray": records["gray"].astype(np.int32),
        "kind": kinds,
        "factor": factors,  # 1 changes nothing, whatever the kind
        "turned": np.stack([jitter & (HUES[place[:, HUE]] == hue) for hue in (0, 1)]).astype(np.int32),
        # torchvision's adjust_hue: in double precision, rounded towards zero, modulo 256
        "hue_byte": (records["hue"].astype(np.float64) * 255).astype(np.int32) % 256,
        "box": _box_weights(records["sigma"]),
    }


def _sent(parameters, device):
    """The arrays as tensors on `device`, sent in one copy that is not waited for."""
    rows = {name: np.atleast_2d(array) for name, array in parameters.items()}
    packed = torch.from_numpy(np.concatenate([array.view(np.int32) for array in rows.values()]))
    packed = to_device(packed, device)
    tensors = packed.split([len(array) for array in rows.values()])
    return {
        name: (tensor.view(torch.float32) if array.dtype == np.float32 else tensor).view(array.shape)
        for (name, array), tensor in zip(parameters.items(), tensors, strict=True)
    }


def _apply_in_chunks(recipe, normalized, hues_below, pixels, parameters):
    views = torch.empty(pixels.shape, device=pixels.device)
    for start in range(0, len(pixels), EAGER_BATCH):
        chunk = slice(start, start + EAGER_BATCH)
        of_chunk = {name: values[..., chunk] for name, values in parameters.items()}
        views[chunk] = _apply(recipe, normalized, hues_below, pixels[chunk], of_chunk)
    return views


def _apply(recipe, normalized, hues_below, pixels, parameters):
    """Pixels to views. The flip comes first, where it moves bytes: it commutes with all the rest."""
    flip = parameters["flip"][:, None, None, None] > 0
    planes = torch.where(flip, pixels.flip(-1), pixels).unbind(1)
    if recipe.gray_p > 0 and recipe.gray_first:
        planes = _grayed(planes, parameters)
    if recipe.jitter_p > 0:
        planes = _jittered(planes, parameters, hues_below)
    if recipe.gray_p > 0 and not recipe.gray_first:
        planes = _grayed(planes, parameters)
    pixels = torch.stack(planes, 1)
    if recipe.blur_p > 0:
        pixels = _blurred(pixels, parameters["box"])
    return _looked_up(normalized, pixels)


# Below, planes are three uint8 (N, H, W), one per channel.


def _grayed(planes, parameters):
    return _select(parameters["gray"], [_gray(planes)] * 3, planes)


def _jittered(planes, parameters, hues_below):
    for blend, hue in ((0, 0), (1, None), (2, 1), (3, None)):
        planes = _blended(planes, parameters["kind"][blend], parameters["factor"][blend])
        if hue is not None:
            turned = _hue_turned(planes, parameters["hue_byte"], hues_below)
            planes = _select(parameters["turned"][hue], turned, planes)
    return planes


def _select(mask, yes, no):
    mask = mask[:, None, None] > 0
    return [torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)]


def _blended(planes, kind, factor):
    """Brightness, contrast and saturation: blends with black, with the mean gray, with the gray image."""
    kind, factor = kind[:, None, None], factor[:, None, None]
    gray = _gray(planes)
    other = torch.where(kind == SATURATION, gray, torch.where(kind == CONTRAST, _mean(gray), 0))
    return [_blend(plane, other, factor) for plane in planes]


def _gray(planes):
    """convert("L"): (19595 R + 38470 G + 7471 B + 2^15) / 2^16, rounded down."""
    r, g, b = (plane.float() for plane in planes)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) * 2**-16).to(torch.uint8)


def _mean(gray):
    """ImageEnhance.Contrast's gray level, int(mean + 0.5), of each plane: uint8 (N, 1, 1)."""
    count = gray.shape[-2] * gray.shape[-1]
    total = gray.int().sum((-2, -1), keepdim=True)  # int64
    return torch.div(2 * total + count, 2 * count, rounding_mode="floor").to(torch.uint8)


def _blend(plane, other, factor):
    """Image.blend(other, plane, factor), rounded twice and down: other + factor * (plane - other).

    PIL clips the sum; clipping the product to what the sum may reach gives the same byte and keeps a
    compiler from joining the two into one FMA, which would skip the product's rounding.
    """
    other = other.float()
    step = factor * (plane.float() - other)
    return (other + torch.minimum(torch.maximum(step, -other), 255 - other)).to(torch.uint8)


def _hue_turned(planes, hue_byte, hues_below):
    """Convert to "HSV", add a byte to H (modulo 256), convert to "RGB"."""
    hue, saturation, value = _to_hsv(*(plane.float() for plane in planes), hues_below)
    hue = hue + hue_byte.float()[:, None, None]
    return _to_rgb(torch.where(hue > 255, hue - 256, hue), saturation, value)


def _to_hsv(r, g, b, hues_below):
    """rgb2hsv_row of Convert.c: float32 planes that hold bytes.

    H and S are 255 times a quotient, rounded down. PIL's quotients carry rounding errors, which matter
    only where the result is an integer in exact arithmetic: there S is right, and H may come out one
    less, depending on H alone (_hues_below).
    """
    value = torch.maximum(torch.maximum(r, g), b)
    spread = value - torch.minimum(torch.minimum(r, g), b)
    saturation = torch.floor((255 * spread + 0.5) / value.clamp(min=1))
    sixths = torch.where(r == value, g - b, torch.where(g == value, 2 * spread + b - r, 4 * spread + r - g))
    sixths = 85 * torch.where(sixths < 0, sixths + 6 * spread, sixths)
    divisor = 2 * spread.clamp(min=0.5)
    hue = torch.floor((sixths + 0.5) / divisor)
    below = hues_below[hue.int()]
    return torch.where(hue * divisor == sixths, hue - below, hue), saturation, value


def _to_rgb(hue, saturation, value):
    """hsv2rgb of Convert.c: uint8 planes from float32 ones that hold bytes.

    p, q and t are quotients by 255 or 255^2, rounded to nearest; none lies half way, and PIL's own errors are
    too small to matter: all 2^24 triples of bytes were tried. q serves the odd sextants, t the even ones.
    """
    sextant = torch.floor((6 * hue + 0.5) * (1 / 255))
    rest = 6 * hue - 255 * sextant
    odd = (sextant == 1) | (sextant == 3) | (sextant == 5)
    p = torch.floor((value * (255 - saturation) + 127.5) * (1 / 255))
    numerator = value * (65025 - saturation * torch.where(odd, rest, 255 - rest)) + 32512
    between = torch.floor(numerator * (1 / 65025))  # this divisor is too large for half a unit to decide
    left = numerator - 65025 * between
    between = torch.where(left < 0, between - 1, torch.where(left >= 65025, between + 1, between))

    def channel(full, rising_or_falling):
        is_full = (sextant == full[0]) | (sextant == full[1])
        is_between = (sextant == rising_or_falling[0]) | (sextant == rising_or_falling[1])
        return torch.where(is_full, value, torch.where(is_between, between, p)).to(torch.uint8)

    sextant = torch.where(sextant == 6, 0, sextant)  # H = 255
    return channel((0, 5), (1, 4)), channel((1, 2), (0, 3)), channel((3, 4), (2, 5))


def _blurred(pixels, box):
    """ImageFilter.GaussianBlur on uint8 (N, 3, H, W): three box filters along rows, three along columns.

    box: _box_weights. Each filter rounds to bytes and repeats the border, as BoxBlur.c does. Its sums reach
    2^32; those of bytes less 128 fit into int32.
    """
    center, *sides = box[..., None, None, None]
    missing = 2**24 - center - 2 * sum(sides)  # 0 or 1: the weights do not quite sum to 2^24
    half = 2**23 - 128 * missing
    for dim in (-1, -1, -1, -2, -2, -2):
        total = center * (pixels.int() - 128) + half
        for offset, weight in enumerate(sides, start=1):
            total = total + weight * (
                _shifted(pixels, dim, -offset).int() + _shifted(pixels, dim, offset) - 256
            )
        pixels = ((total >> 24) + 128).to(torch.uint8)
    return pixels


def _shifted(pixels, dim, offset):
    """pixels[i + offset] along `dim`, the border repeated."""
    size = pixels.shape[dim]
    return pixels.index_select(dim, (torch.arange(size, device=pixels.device) + offset).clamp(0, size - 1))


def _box_weights(sigma):
    """BoxBlur.c's weights at distance 0 to REACH for `sigma`, float32 (N,): int32 (REACH + 1, N), of 2^-24.

    The types are those of _gaussian_blur_radius and ImagingHorizontalBoxBlur, which decide the last bits.
    """
    if len(sigma) and not 0 <= sigma.min() <= sigma.max() < MAX_SIGMA:
        raise ValueError(f"a blur's sigma must be from 0 to below {MAX_SIGMA:.2f} pixels, not {sigma.max()}")
    one, three, six = np.float32(1), np.float32(3), np.float32(6)
    variance = sigma * sigma / three
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1) / 2).astype(np.float32)
    part = (2 * whole + one) * (whole * (whole + one) - three * variance)
    part = part / (six * (variance - (whole + one) * (whole + one)))
    radius = whole + part
    reach = radius.astype(np.int64)
    inner = (np.float32(2**24) / (radius * 2 + one)).astype(np.int64)
    outer = (2**24 - (2 * reach + 1) * inner) // 2
    distance = np.arange(REACH + 1)[:, None]
    return np.where(distance <= reach, inner, np.where(distance == reach + 1, outer, 0)).astype(np.int32)


def _looked_up(normalized, pixels):
    """normalized[channel, byte] for the bytes of uint8 (..., 3, H, W): float32, contiguous."""
    planes = pixels.unbind(-3)
    return torch.stack([table[plane.int()] for table, plane in zip(normalized, planes, strict=True)], -3)


@functools.cache
def _normalized_bytes(device):
    """normalize() of the 256 bytes in each channel, computed on the CPU: float32 (3, 256) on `device`."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalize(levels)[:, 0].to(device)


@functools.cache
def _hues_below(device):
    """What PIL's float errors take off H when a color's hue is exactly H / 255: 0 or 1, float32 (255,).

    Pillow itself is asked, for a color of each hue with values from 0 to 170, the sixth of a turn there.
    """
    hue = np.arange(255) * 4
    red = np.abs(hue - 510) - 170
    green, blue = 340 - np.abs(hue - 340), 340 - np.abs(hue - 680)
    colors = np.stack([red, green, blue], -1).clip(0, 170).astype(np.uint8)
    hues = np.array(Image.fromarray(colors[None]).convert("HSV"))[0, :, 0]
    return torch.from_numpy(np.arange(255) - hues).float().to(device)
