"""Random bits, a shortcut that can be turned up: RandBit (Chen, Luo & Li 2021, arXiv 2011.02803, section 4).

Every image gets B bits of its own, each a constant channel of zeros or ones beside the picture's three, the
same in both views whatever else is done to them. So an encoder can tell 2^B groups of images apart without
looking at a picture, and B sets how much of the instance task that solves. As in the authors' notebook
(randbits_mnist.ipynb of google-research/simclr), the channels hold 0 and 1, and held-out images have bits
too, which tell nothing about what they show.
"""

from functools import partial

import torch
from torch import nn

from moco.seeds import BITS, fold

MOST = 63  # bits in one number of moco.seeds.fold
TRAIN, HELD_OUT = range(2)  # the two parts of a data set, whose images number anew


def bits_of(seed, part, indices, bits):
    """float32 (N, bits) of 0 and 1: those of the images `indices` of a part, TRAIN or HELD_OUT."""
    numbers = torch.tensor([fold(seed, BITS, part, index) for index in indices], dtype=torch.int64)
    return (numbers[:, None] >> torch.arange(bits)).bitwise_and(1).float()


def with_channels(images, values):
    """images (N, 3, H, W) and, behind, a constant channel for each of the values (N, B): (N, 3 + B, H, W)."""
    planes = values.to(images)[:, :, None, None].expand(-1, -1, *images.shape[2:])
    return torch.cat([images, planes], dim=1)


def with_input_channels(construct, bits):
    """The callable `construct`, (num_classes) -> network, with `bits` more input channels; itself with 0.

    Weights for the picture are those of the network without bits; weights for bits are drawn after them,
    normal, with the same standard deviation.
    """
    return partial(_widened, construct, bits) if bits else construct


def _widened(construct, bits, num_classes):
    network = construct(num_classes=num_classes)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    weight = first.weight.detach()
    out, channels, height, width = weight.shape
    extra = torch.empty(out, bits, height, width).normal_(std=weight.std().item())
    first.weight = nn.Parameter(torch.cat([weight, extra], dim=1))
    first.in_channels = channels + bits
    return network
