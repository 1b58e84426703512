"""BatchNorm's running statistics taken anew, of other images than an encoder was trained on."""

import copy

import torch
from torch import nn

from moco.data import Loading
from moco.distributed import Process
from moco.views import normalise

BATCH = 256


def renew_statistics(encoder, images, size, device):
    """Give every BatchNorm of `encoder` the statistics of central views of `images`, an ImageFolder.

    Means over batches of 256 in an order that mixes classes, the last one left out unless it is whole or the
    only one (Li et al. 2017, "Revisiting batch normalization for practical domain adaptation"). No weight
    changes. An encoder that was read on images unlike those it was trained on would else be read through the
    means and variances of the latter; an untrained one, whose statistics are 0 and 1, through none.
    """
    order = torch.randperm(len(images.samples), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = copy.copy(images)
    mixed.samples, mixed.targets = ([of[i] for i in order] for of in (images.samples, images.targets))
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    encoder.eval()
    kept = [(norm.momentum, getattr(norm, "splits", 1)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.splits = None, 1  # a mean over all batches; each one group
        norm.train()
    with torch.no_grad():
        for batch in Loading(size, "pil", BATCH, 0).validation(mixed, Process.alone(device)):
            views = normalise(batch.pixels[0])
            if len(views) == min(BATCH, len(order)):
                encoder(views)
    for norm, (norm.momentum, norm.splits) in zip(norms, kept, strict=True):
        norm.eval()
