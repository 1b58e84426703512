"""torchvision's photometric operations on batches of floats: close to PIL's pixels, not equal.

Source: torchvision.transforms' rgb_to_grayscale, adjust_* and gaussian_blur on float tensors, here with one
parameter per image. The blur repeats the border as PIL's does, where torchvision mirrors it.
"""

import numpy as np
import torch

from moco.loader import IMAGENET_MEAN, IMAGENET_STD

REACH = 6  # pixels that the blur takes on either side: three times the largest published sigma


class FloatPixels:
    """The arithmetic of mode "float": planes are (N, H, W) from 0 to 1, parameters (N, 1, 1).

    Planes are stored as float16 on CUDA, where memory is what takes time (an error of 1/16 level), and
    filtered by tensor cores; calculations are in float32.
    """

    def __init__(self, device):
        self.stored = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.centre, self.scale = (
            torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def load(self, pixels):
        return (pixels.float() / 255).to(self.stored)

    def gray(self, planes):
        r, g, b = (plane.float() for plane in planes)
        return (0.2989 * r + 0.587 * g + 0.114 * b).to(self.stored)

    def mean(self, gray):
        return gray.mean((-2, -1), keepdim=True, dtype=torch.float32)

    def blend(self, plane, other, factor):
        return (factor * plane.float() + (1 - factor) * other.float()).clamp(0, 1).to(self.stored)

    def turn_hue(self, planes, views):
        """Add a part of a turn to the hue; RGB from HSV by one formula for all six sextants."""
        r, g, b = (plane.float() for plane in planes)
        value = torch.maximum(torch.maximum(r, g), b)
        spread = value - torch.minimum(torch.minimum(r, g), b)
        sixths = torch.where(
            r == value, g - b, torch.where(g == value, 2 * spread + b - r, 4 * spread + r - g)
        )
        sixths = sixths / torch.where(spread == 0, 1, spread) + 6 * views["hue"][:, None, None]
        ways = (torch.remainder(sixths + start, 6) for start in (5, 3, 1))
        return [(value - spread * torch.minimum(way, 4 - way).clamp(0, 1)).to(self.stored) for way in ways]

    def blur(self, pixels, views):
        """Gaussian filters along rows and columns of (N, 3, H, W), as products with banded matrices."""
        count, channels, height, width = pixels.shape
        along_rows = self._filters(views["gauss"], width).transpose(1, 2)
        pixels = (pixels.reshape(count, channels * height, width) @ along_rows).view(pixels.shape)
        return self._filters(views["gauss"], height)[:, None] @ pixels

    def normalise(self, pixels):
        return (pixels.float() - self.centre) / self.scale

    def _filters(self, weights, size):
        """A matrix (size, size) per image that filters a column of `size` pixels: (N, size, size)."""
        place = torch.arange(size, device=weights.device)
        distance = torch.arange(-REACH, REACH + 1, device=weights.device)
        source = (place + distance[:, None]).clamp(0, size - 1)
        chosen = (source[..., None] == place).float().flatten(1)
        both_sides = torch.cat([weights[1:].flip(0), weights])
        return (both_sides.T @ chosen).view(-1, size, size).to(self.stored)


def gauss_weights(sigma):
    """The filter's weights at distance 0 to REACH for `sigma` (N,), 0 for no blur: float32 (REACH + 1, N)."""
    distance = np.arange(REACH + 1)[:, None]
    weights = np.exp(-0.5 * (distance / np.maximum(sigma.astype(np.float64), 1e-3)) ** 2)
    return (weights / (weights[0] + 2 * weights[1:].sum(0))).astype(np.float32)
