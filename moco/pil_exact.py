"""PIL's photometric operations on batches of bytes, equal to PIL's to the bit on every device.

Sources: Pillow's src/libImaging (Blend.c, BoxBlur.c, Convert.c) and ImageEnhance.py, as built for x86-64.
Compilers for GPUs round a product and a sum once instead of twice (FMA) and divide inexactly. So numbers are
integers below 2^24, which float32 holds and adds exactly; a quotient is only ever rounded down, after half a
unit in its numerator has moved it away from the integers by more than a division's error.
"""

import numpy as np
import torch
from PIL import Image

from moco.loader import IMAGENET_MEAN, IMAGENET_STD

REACH = 2  # pixels that one box filter takes on either side; enough for every sigma below MAX_SIGMA
MAX_SIGMA = 6**0.5  # from here on BoxBlur.c's boxes have an integer radius of 2


class PilExact:
    """The arithmetic of mode "exact": planes are uint8 (N, H, W), parameters (N, 1, 1), results are bytes."""

    def __init__(self, device):
        self.normalised = _normalised_bytes().to(device)  # a table: no device has to divide as a CPU does
        self.hue_below = _hues_below().to(device)

    def load(self, pixels):
        return pixels

    def gray(self, planes):
        """convert("L"): (19595 R + 38470 G + 7471 B + 2^15) / 2^16, rounded down."""
        r, g, b = (plane.float() for plane in planes)
        return ((r * 19595 + g * 38470 + b * 7471 + 32768) * 2**-16).to(torch.uint8)

    def mean(self, gray):
        """ImageEnhance.Contrast's gray level, int(mean + 0.5), of each plane: uint8 (N, 1, 1)."""
        count = gray.shape[-2] * gray.shape[-1]
        total = gray.int().sum((-2, -1), keepdim=True)  # int64
        return torch.div(2 * total + count, 2 * count, rounding_mode="floor").to(torch.uint8)

    def blend(self, plane, other, factor):
        """Image.blend(other, plane, factor), rounded twice and down: other + factor * (plane - other).

        PIL clips the sum; clipping the product to what the sum may reach gives the same byte and keeps a
        compiler from joining the two into one FMA, which would skip the product's rounding.
        """
        other = other.float()
        step = factor * (plane.float() - other)
        return (other + torch.minimum(torch.maximum(step, -other), 255 - other)).to(torch.uint8)

    def turn_hue(self, planes, views):
        """Convert to "HSV", add a byte to H (modulo 256), convert to "RGB"."""
        hue, saturation, value = self._to_hsv(*(plane.float() for plane in planes))
        hue = hue + views["hue_byte"].float()[:, None, None]
        return _to_rgb(torch.where(hue > 255, hue - 256, hue), saturation, value)

    def blur(self, pixels, views):
        """ImageFilter.GaussianBlur on (N, 3, H, W): three box filters along rows, three along columns.

        Each rounds to bytes and repeats the border, as BoxBlur.c does. Its sums reach 2^32; those of bytes
        less 128 fit into int32.
        """
        centre, *sides = views["box"][..., None, None, None]
        missing = 2**24 - centre - 2 * sum(sides)  # 0 or 1: the weights do not quite sum to 2^24
        half = 2**23 - 128 * missing
        for dim in (-1, -1, -1, -2, -2, -2):
            total = centre * (pixels.int() - 128) + half
            for offset, weight in enumerate(sides, start=1):
                total = total + weight * (
                    shifted(pixels, dim, -offset).int() + shifted(pixels, dim, offset) - 256
                )
            pixels = ((total >> 24) + 128).to(torch.uint8)
        return pixels

    def normalise(self, pixels):
        channel = torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
        return self.normalised[channel, pixels.int()]

    def _to_hsv(self, r, g, b):
        """rgb2hsv_row of Convert.c: float32 planes that hold bytes.

        H and S are 255 times a quotient, rounded down. PIL's quotients carry rounding errors, which matter
        only where the result is an integer in exact arithmetic: there S is right, and H may come out one
        less, depending on H alone (_hues_below).
        """
        value = torch.maximum(torch.maximum(r, g), b)
        spread = value - torch.minimum(torch.minimum(r, g), b)
        saturation = torch.floor((255 * spread + 0.5) / value.clamp(min=1))
        sixths = torch.where(
            r == value, g - b, torch.where(g == value, 2 * spread + b - r, 4 * spread + r - g)
        )
        sixths = 85 * torch.where(sixths < 0, sixths + 6 * spread, sixths)
        divisor = 2 * spread.clamp(min=0.5)
        hue = torch.floor((sixths + 0.5) / divisor)
        below = self.hue_below[hue.int()]
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


def shifted(pixels, dim, offset):
    """pixels[i + offset] along `dim`, the border repeated."""
    size = pixels.shape[dim]
    return pixels.index_select(dim, (torch.arange(size, device=pixels.device) + offset).clamp(0, size - 1))


def box_weights(sigma):
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


def _normalised_bytes():
    """The 256 bytes of the three channels after ToTensor and Normalize: float32 (3, 256)."""
    scaled = torch.arange(256, dtype=torch.uint8).float().div_(255)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None], torch.tensor(IMAGENET_STD)[:, None]
    return scaled.repeat(3, 1).sub_(mean).div_(std)


def _hues_below():
    """What PIL's float errors take off H when a colour's hue is exactly H / 255: 0 or 1, float32 (255,).

    Pillow itself is asked, for a colour of each hue with values from 0 to 170, the sixth of a turn there.
    """
    hue = np.arange(255) * 4
    red = np.abs(hue - 510) - 170
    green, blue = 340 - np.abs(hue - 340), 340 - np.abs(hue - 680)
    colours = np.stack([red, green, blue], -1).clip(0, 170).astype(np.uint8)
    hues = np.array(Image.fromarray(colours[None]).convert("HSV"))[0, :, 0]
    return torch.from_numpy(np.arange(255) - hues).float()
