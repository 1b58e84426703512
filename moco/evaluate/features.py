"""The backbone of a checkpoint, its features of a data set, and how features lie on the sphere."""

import contextlib

import torch
from torch import nn

from moco import zoo
from moco.data.device import normalize
from moco.encoders import base_encoder
from moco.run.backbone import load_encoder
from moco.run.checkpoint import check_arch, read


def backbone_of(path_or_name, arch=None):
    """(network, checkpoint) of a checkpoint file or the name of a released model.

    The network is a torchvision model in eval mode on the CPU whose `fc` is nn.Identity, so that it gives the
    pooled features N x d. arch: its torchvision name (default: the checkpoint's entry `arch`, else resnet50).
    checkpoint: the dict that moco.run.checkpoint.read gives, with "arch", and "taken": where in the file the
    backbone was, in words. Raises UserError.
    """
    path = zoo.resolve(path_or_name)
    checkpoint = read(path)
    named = checkpoint.get("arch")
    arch = arch or (named if isinstance(named, str) else "resnet50")
    check_arch(checkpoint, arch, path)
    network = backbone(arch)
    taken = load_encoder(network, checkpoint, path, arch)
    return network.eval(), checkpoint | {"arch": arch, "taken": taken}


def backbone(arch):
    """The torchvision model `arch` with random weights and nn.Identity as its `fc`: images to features."""
    network = base_encoder(arch)(num_classes=1)
    network.fc = nn.Identity()
    return network


@torch.no_grad()
def features_of(network, loader, device, autocast=contextlib.nullcontext):
    """(features N x d float32, targets N int64) of a ValidationLoader's images, in its order, on `device`.

    network: in eval mode on the loader's device; autocast: makes the context of a forward pass.
    """
    features, targets = [], []
    for batch in loader:
        with autocast():
            features.append(network(normalize(batch.pixels[0])).float().to(device))
        targets.append(batch.targets.to(device))
    return torch.cat(features), torch.cat(targets)


def similarities(q, k, mean_key):
    """The four numbers below by name. q, k: positive pairs, N x C; mean_key: the mean of the queue, (C,).

    All of these functions take unit rows (float32 or float64, without gradient) and return a 0-dim. tensor on
    their device, without waiting for it and without an N x K product.
    """
    return {
        "pos_similarity": pos_similarity(q, k),
        "neg_similarity": neg_similarity(q, mean_key),
        "alignment": alignment(q, k),
        "uniformity": uniformity(q),
    }


def pos_similarity(q, k):
    """Mean cosine of the rows of q and k, N x C each."""
    return (q * k).sum(dim=1).mean()


def neg_similarity(q, mean_key):
    """Mean cosine of the N rows of q and the queue's keys, from the mean of the keys: cosines are linear."""
    return q.mean(dim=0) @ mean_key


def alignment(q, k):
    """Mean squared distance of positive pairs, the rows of q and k (Wang & Isola 2020, with alpha 2)."""
    return (q - k).square().sum(dim=1).mean()


def uniformity(q):
    """log of the mean of exp(-2 |q_i - q_j|^2) over pairs i < j (Wang & Isola 2020, t 2); nan for one row."""
    return torch.pdist(q).square().mul(-2).exp().mean().log()
