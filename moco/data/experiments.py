"""Random bits, a shortcut that can be turned up: RandBit (Chen, Luo & Li 2021, arXiv 2011.02803, section 4).

Every image gets B bits of its own, each a constant channel of zeros or ones after its three, the same in
both views. So an encoder can distinguish 2^B groups of images without looking at the picture, and B sets how
much of the instance task that solves. As in the authors' notebook (randbits_mnist.ipynb of
google-research/simclr), the channels hold 0 and 1, and validation images have bits too, which do not depend
on what they show.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco.seeds import BITS, fold
from moco.shuffle import to_device

MOST = 63  # bits in one number of moco.seeds.fold
# What bits are of: the images of the two parts of a data set, each with numbers from 0; again these images,
# drawn anew; and single views.
TRAIN, HELD_OUT, TRAIN_AGAIN, HELD_OUT_AGAIN, VIEWS = range(5)


def bits_of(seed, part, indices, bits):
    """float32 (N, bits) of 0 and 1: those of the images `indices` of a part."""
    return _lowest_bits([fold(seed, BITS, part, index) for index in indices], bits)


def bits_of_views(seed, records, indices, bits):
    """float32 (views, N, bits) of 0 and 1 for the `records` of a Batch, (views, N): functions of the image
    and of what was drawn for the view, so that they change from view to view and from epoch to epoch.
    """
    drawn = [[zlib.crc32(record.tobytes()) for record in view] for view in records]
    numbers = [
        [fold(seed, BITS, VIEWS, view, *place) for place in zip(indices, row, strict=True)]
        for view, row in enumerate(drawn)
    ]
    return _lowest_bits(numbers, bits)


def _lowest_bits(numbers, bits):
    numbers = torch.tensor(numbers, dtype=torch.int64)
    return (numbers[..., None] >> torch.arange(bits)).bitwise_and(1).float()


def with_channels(images, values):
    """images (N, 3, H, W), then a constant channel for each of the values (N, B): (N, 3 + B, H, W)."""
    planes = values.to(images)[:, :, None, None].expand(-1, -1, *images.shape[2:])
    return torch.cat([images, planes], dim=1)


@dataclass(frozen=True)
class RandomBits:
    """Appends the random bits of run `seed` to the views that a DeviceAugment, `augment`, gives: those of the
    image, or, as a control in which they tell nothing, others for each view.
    """

    bits: int
    seed: int
    augment: Callable
    per_view: bool = False

    def __call__(self, batch):
        """The views of a Batch: float32 (N, 3 + bits, H, W) each."""
        views = self.augment(batch)
        indices = batch.indices.tolist()
        if self.per_view:
            values = bits_of_views(self.seed, batch.records[:, : len(indices)], indices, self.bits)
        else:
            values = bits_of(self.seed, TRAIN, indices, self.bits)[None]
        values = to_device(values, views[0].device).expand(len(views), -1, -1)
        return list(map(with_channels, views, values))
