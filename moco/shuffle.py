"""Shuffled BatchNorm's exchange of images and keys between processes (He et al. 2020, section 3.3).

The published program gathers everyone's images everywhere and picks. Here an image travels to the one
process that encodes it, in the precision that its encoder computes in: what a process sends and receives
does not grow with their number.
"""

import torch
import torch.distributed as dist


@torch.no_grad()
def batch_shuffle(images, order=None):
    """The N images of this process after all processes' images were put in a common random order.

    images: N x 3 x H x W, as many on each process; under autocast they come in its dtype, to which the first
    convolution would round them. order: (N*world,) int64 on the CPU, equal on all processes; None: drawn from
    torch's generator on rank 0. Process r gets the r-th part of images[order]. Returns them and the order
    (N*world,) on the device that undoes it.
    """
    device, world = images.device, world_size()
    if torch.is_autocast_enabled(device.type):
        images = images.to(torch.get_autocast_dtype(device.type))
    if order is None:
        order = _drawn_on_rank_0(len(images) * world, device)
    undo = _sent(torch.argsort(order), device)
    if world == 1:
        return images[_sent(order, device)], undo
    return _exchanged(images, order), undo


@torch.no_grad()
def concat_all_gather(tensor):
    """The tensors of all processes (equal shapes), concatenated over dimension 0 in rank order; without
    gradient.
    """
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _exchanged(images, order):
    """Our part of everyone's images[order]: one all-to-all in which each pair of processes has its share."""
    n, world, me = len(images), world_size(), rank()
    home = order // n  # the process that has an image
    wanted_by = [
        order[to * n : (to + 1) * n][home[to * n : (to + 1) * n] == me] - me * n for to in range(world)
    ]
    sources = home[me * n : (me + 1) * n]  # of what we get, in the order in which we want it
    received = torch.empty_like(images, memory_format=torch.contiguous_format)
    dist.all_to_all_single(
        received,
        images[_sent(torch.cat(wanted_by), images.device)].contiguous(),
        output_split_sizes=torch.bincount(sources, minlength=world).tolist(),
        input_split_sizes=[len(part) for part in wanted_by],
    )
    place = torch.argsort(torch.argsort(sources, stable=True))  # what arrives is sorted by its source
    return received[_sent(place, images.device)]


def _drawn_on_rank_0(count, device):
    order = torch.randperm(count)
    if world_size() == 1:
        return order
    order = order.to(device)
    dist.broadcast(order, src=0)
    return order.cpu()


def _sent(indices, device):
    """Indices made on the CPU, on the device without waiting for it."""
    if device.type != "cuda":
        return indices
    return indices.pin_memory().to(device, non_blocking=True)
