"""Shuffled BatchNorm's exchange of images and keys between processes (He et al. 2020, section 3.3).

The published program gathers all images on all processes, and each picks its part. Here an image goes to
the one process that encodes it, in the precision that the encoder computes in, so what a process sends and
receives does not grow with their number.
"""

import torch
import torch.distributed as dist


@torch.no_grad()
def batch_shuffle(images, order=None):
    """This process's part of all processes' images in a common random order, and the inverse of the order.

    images: N x 3 x H x W, the same N on each process. order: (N*world,) int64 on the CPU, equal on all
    processes; None: drawn from torch's generator on rank 0. Returns (shuffled, inverse): the rank-th N of all
    images[order], under autocast in its dtype (to which the first convolution would round them), and
    (N*world,) int64 on their device. The gathered features[inverse] are in the images' own order.
    """
    device, world = images.device, world_size()
    if torch.is_autocast_enabled(device.type):
        images = images.to(torch.get_autocast_dtype(device.type))
    if order is None:
        order = _drawn_on_rank_0(len(images) * world, device)
    undo = to_device(torch.argsort(order), device)
    if world == 1:
        return images[to_device(order, device)], undo
    return _exchanged(images, order), undo


@torch.no_grad()
def concat_all_gather(tensor):
    """The tensors of all processes, of equal shapes, concatenated in rank order; without gradient."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def to_device(tensor, device):
    """A tensor of the CPU on `device`, without waiting for it."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _exchanged(images, order):
    """The part of all images[order] that this process encodes, by one all-to-all."""
    n, world, me = len(images), world_size(), rank()
    parts = order.view(world, n)  # the images that each process encodes
    sources = parts // n  # the process that has each of them
    to_send = [part[source == me] - me * n for part, source in zip(parts, sources, strict=True)]
    received = torch.empty_like(images, memory_format=torch.contiguous_format)
    dist.all_to_all_single(
        received,
        images[to_device(torch.cat(to_send), images.device)].contiguous(),
        output_split_sizes=torch.bincount(sources[me], minlength=world).tolist(),
        input_split_sizes=[len(part) for part in to_send],
    )
    position = torch.argsort(torch.argsort(sources[me], stable=True))  # they arrive sorted by source
    return received[to_device(position, images.device)]


def _drawn_on_rank_0(count, device):
    order = torch.randperm(count)
    if world_size() == 1:
        return order
    order = order.to(device)
    dist.broadcast(order, src=0)
    return order.cpu()
