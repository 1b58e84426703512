"""Random bits, a shortcut that can be turned up: RandBit (Chen, Luo & Li 2021, arXiv 2011.02803, section 4).

Every image gets B bits of its own, each a constant channel of zeros or ones after its three, the same in
both views. So an encoder can distinguish 2^B groups of images without looking at the picture, and B sets how
much of the instance task that solves. As in the authors' notebook (randbits_mnist.ipynb of
google-research/simclr), the channels hold 0 and 1, and validation images have bits too, which do not depend
on what they show.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco.seeds import BITS, fold
from moco.shuffle import to_device

MOST = 63  # bits in one number of moco.seeds.fold
TRAIN, HELD_OUT = range(2)  # the two parts of a data set, each with image numbers from 0


def bits_of(seed, part, indices, bits):
    """float32 (N, bits) of 0 and 1: those of the images `indices` of a part, TRAIN or HELD_OUT."""
    numbers = torch.tensor([fold(seed, BITS, part, index) for index in indices], dtype=torch.int64)
    return (numbers[:, None] >> torch.arange(bits)).bitwise_and(1).float()


def with_channels(images, values):
    """images (N, 3, H, W), then a constant channel for each of the values (N, B): (N, 3 + B, H, W)."""
    planes = values.to(images)[:, :, None, None].expand(-1, -1, *images.shape[2:])
    return torch.cat([images, planes], dim=1)


@dataclass(frozen=True)
class RandomBits:
    """Appends the random bits of run `seed` to the views that a DeviceAugment, `augment`, gives."""

    bits: int
    seed: int
    augment: Callable

    def __call__(self, batch):
        """The views of a Batch: float32 (N, 3 + bits, H, W) each."""
        views = self.augment(batch)
        values = bits_of(self.seed, TRAIN, batch.indices.tolist(), self.bits)
        values = to_device(values, views[0].device)
        return [with_channels(view, values) for view in views]
