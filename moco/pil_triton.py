"""moco.pil_exact in two GPU kernels, with equal bits and without the work that an image does not need.

Each program has one image, or one channel of it, and branches on what was drawn; torch's operations must do
everything to every image. The formulas and their reasons are moco.pil_exact's, the parameters
moco.photometric's.
"""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 1024  # pixels that a program has at hand when it jitters
TILE = 1024  # bytes when it blurs: 8 for each of 128 threads, which is what their registers serve


def finish(tables, recipe, pixels, views):
    """The photometric half of `recipe` for uint8 (N, 3, H, W) pixels: float32, normalised.

    tables: a moco.pil_exact.PilExact of the device.
    """
    count, _, height, width = pixels.shape
    jittered = torch.empty_like(pixels)
    scratch, finished = torch.empty_like(jittered), torch.empty(pixels.shape, device=pixels.device)
    drawn = [views[name] for name in ("kind", "factor", "turned", "hue_byte", "gray")]
    lanes = triton.next_power_of_2(width)
    on_device = torch.cuda.device(pixels.device) if pixels.is_cuda else contextlib.nullcontext()
    with on_device:
        _jitter[(count,)](
            pixels, jittered, *drawn, tables.hue_below, count, height * width,
            JITTER=recipe.jitter_p > 0, GRAY=recipe.gray_p > 0, GRAY_FIRST=recipe.gray_first, BLOCK=BLOCK,
        )  # fmt: skip
        _blur_and_normalise[(3 * count,)](
            jittered, scratch, finished, views["box"], views["flip"], tables.normalised, count,
            BLUR=recipe.blur_p > 0, HEIGHT=height, WIDTH=width, LANES=lanes, ROWS=max(1, TILE // lanes),
        )  # fmt: skip
    return finished


@triton.jit
def _jitter(
    pixels, out, kind, factor, turned, hue_byte, gray, hue_below, count, size,
    JITTER: tl.constexpr, GRAY: tl.constexpr, GRAY_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grayscale and jitter of one image. A contrast needs a mean first, of what comes before it."""
    image = tl.program_id(0)
    pixels += image.to(tl.int64) * 3 * size
    out += image.to(tl.int64) * 3 * size
    kind, factor, turned = kind + image, factor + image, turned + image
    is_gray = tl.load(gray + image) > 0
    shift = tl.load(hue_byte + image).to(tl.float32)
    early_gray = GRAY and GRAY_FIRST and is_gray
    late_gray = GRAY and not GRAY_FIRST and is_gray

    contrast = -1  # the blend that it is
    if JITTER:
        for place in tl.static_range(4):
            contrasted = tl.load(kind + place * count) == 1 and tl.load(factor + place * count) != 1
            contrast = tl.where(contrasted, place, contrast)
    level = 0.0
    if contrast >= 0:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            r, g, b = _load(pixels, index, size, early_gray)
            r, g, b = _blends(r, g, b, contrast, 0.0, kind, factor, turned, shift, hue_below, count)
            total += tl.where(index < size, _gray(r, g, b), 0).to(tl.int32)
        level = ((2 * tl.sum(total.to(tl.int64)) + size) // (2 * size)).to(tl.float32)

    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        r, g, b = _load(pixels, index, size, early_gray)
        if JITTER:
            r, g, b = _blends(r, g, b, 4, level, kind, factor, turned, shift, hue_below, count)
        if late_gray:
            r = _gray(r, g, b)
            g = r
            b = r
        tl.store(out + index, r.to(tl.uint8), index < size)
        tl.store(out + size + index, g.to(tl.uint8), index < size)
        tl.store(out + 2 * size + index, b.to(tl.uint8), index < size)


@triton.jit
def _load(pixels, index, size, as_gray):
    r = tl.load(pixels + index, index < size, 0).to(tl.float32)
    g = tl.load(pixels + size + index, index < size, 0).to(tl.float32)
    b = tl.load(pixels + 2 * size + index, index < size, 0).to(tl.float32)
    if as_gray:
        r = _gray(r, g, b)
        g = r
        b = r
    return r, g, b


@triton.jit
def _blends(r, g, b, end, level, kind, factor, turned, shift, hue_below, count):
    """The first `end` of the four blends, each with the hue that may follow it."""
    for place in tl.static_range(4):
        if place < end:
            weight = tl.load(factor + place * count)
            if weight != 1:
                what = tl.load(kind + place * count)
                other = tl.where(what == 2, _gray(r, g, b), tl.where(what == 1, level, 0.0))
                r = _blend(r, other, weight)
                g = _blend(g, other, weight)
                b = _blend(b, other, weight)
            if place % 2 == 0:  # noqa: SIM102 (decided when compiled, the next one for each image)
                if tl.load(turned + (place // 2) * count) > 0:
                    r, g, b = _turn_hue(r, g, b, shift, hue_below)
    return r, g, b


@triton.jit
def _gray(r, g, b):
    return tl.floor((r * 19595.0 + g * 38470.0 + b * 7471.0 + 32768.0) * (1 / 65536))


@triton.jit
def _blend(plane, other, factor):
    step = factor * (plane - other)
    return tl.floor(other + tl.minimum(tl.maximum(step, -other), 255.0 - other))


@triton.jit
def _turn_hue(r, g, b, shift, hue_below):
    value = tl.maximum(tl.maximum(r, g), b)
    spread = value - tl.minimum(tl.minimum(r, g), b)
    saturation = tl.floor((255.0 * spread + 0.5) / tl.maximum(value, 1.0))
    sixths = tl.where(r == value, g - b, tl.where(g == value, 2.0 * spread + b - r, 4.0 * spread + r - g))
    sixths = 85.0 * tl.where(sixths < 0, sixths + 6.0 * spread, sixths)
    divisor = 2.0 * tl.maximum(spread, 0.5)
    hue = tl.floor((sixths + 0.5) / divisor)
    below = tl.load(hue_below + hue.to(tl.int32))
    hue = tl.where(hue * divisor == sixths, hue - below, hue) + shift
    hue = tl.where(hue > 255.0, hue - 256.0, hue)

    sextant = tl.floor((6.0 * hue + 0.5) * (1 / 255))
    rest = 6.0 * hue - 255.0 * sextant
    odd = (sextant == 1) | (sextant == 3) | (sextant == 5)
    p = tl.floor((value * (255.0 - saturation) + 127.5) * (1 / 255))
    numerator = value * (65025.0 - saturation * tl.where(odd, rest, 255.0 - rest)) + 32512.0
    between = tl.floor(numerator * (1 / 65025))
    left = numerator - 65025.0 * between
    between = tl.where(left < 0, between - 1.0, tl.where(left >= 65025.0, between + 1.0, between))
    sextant = tl.where(sextant == 6, 0.0, sextant)
    return (
        _channel(sextant, 0, 5, 1, 4, value, between, p),
        _channel(sextant, 1, 2, 0, 3, value, between, p),
        _channel(sextant, 3, 4, 2, 5, value, between, p),
    )


@triton.jit
def _channel(
    sextant,
    full: tl.constexpr,
    full2: tl.constexpr,
    slope: tl.constexpr,
    slope2: tl.constexpr,
    value,
    between,
    p,
):
    on_slope = (sextant == slope) | (sextant == slope2)
    return tl.where((sextant == full) | (sextant == full2), value, tl.where(on_slope, between, p))


@triton.jit
def _blur_and_normalise(
    plane, scratch, finished, box, flip, normalised, count,
    BLUR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One channel of one image: six passes from `plane` to `scratch` and back, then the table, flipped."""
    image, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
    offset = tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    plane, scratch, finished = plane + offset, scratch + offset, finished + offset
    if BLUR:
        centre = tl.load(box + image)
        near, far = tl.load(box + count + image), tl.load(box + 2 * count + image)
        if near > 0:
            _pass(plane, scratch, True, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
            _pass(scratch, plane, True, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
            _pass(plane, scratch, True, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
            _pass(scratch, plane, False, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
            _pass(plane, scratch, False, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
            _pass(scratch, plane, False, centre, near, far, HEIGHT, WIDTH, LANES, ROWS)
    column = tl.arange(0, LANES)[None, :]
    source = tl.where(tl.load(flip + image) > 0, WIDTH - 1 - column, column)
    for top in range(0, HEIGHT, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        inside = (row < HEIGHT) & (column < WIDTH)
        byte = tl.load(plane + row * WIDTH + source, inside, 0).to(tl.int32)
        tl.store(finished + row * WIDTH + column, tl.load(normalised + channel * 256 + byte), inside)


@triton.jit
def _pass(
    read, write, ACROSS: tl.constexpr, centre, near, far,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One box filter, along the rows (ACROSS) or the columns; all threads wait for its end."""
    half = (1 << 23) - 128 * ((1 << 24) - centre - 2 * near - 2 * far)
    column = tl.arange(0, LANES)[None, :]
    for top in range(0, HEIGHT, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        inside = (row < HEIGHT) & (column < WIDTH)
        here = tl.load(read + row * WIDTH + column, inside, 0).to(tl.int32)
        total = half + centre * (here - 128)
        for distance in tl.static_range(1, 3):
            if ACROSS:
                before = tl.load(read + row * WIDTH + tl.maximum(column - distance, 0), inside, 0)
                after = tl.load(read + row * WIDTH + tl.minimum(column + distance, WIDTH - 1), inside, 0)
            else:
                before = tl.load(read + tl.maximum(row - distance, 0) * WIDTH + column, inside, 0)
                after = tl.load(read + tl.minimum(row + distance, HEIGHT - 1) * WIDTH + column, inside, 0)
            weight = near if distance == 1 else far
            total += weight * (before.to(tl.int32) + after.to(tl.int32) - 256)
        tl.store(write + row * WIDTH + column, ((total >> 24) + 128).to(tl.uint8), inside)
    tl.debug_barrier()
