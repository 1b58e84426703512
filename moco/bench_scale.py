"""What one training step sends from GPU to GPU, computed for any number of them.

How the bytes are counted, the same way for every collective: the mean over the ranks of the bytes that
leave a rank, when nothing travels twice. With W ranks and b bytes that a rank hands in,

    all-to-all   b * (W-1)/W      each part goes to its one receiver; here for images in a random order
    all-gather   b * (W-1)        each rank's part has to reach the W-1 others
    broadcast    b * (W-1)/W      W-1 copies have to arrive, whoever passes them on
    all-reduce   b * 2*(W-1)/W    a ring's reduce-scatter and all-gather, each of b/W in W-1 rounds

(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) What a
message costs besides its bytes is left out: rounds and their latency, headers, the uneven load of a
broadcast's tree. So is the start of a run, and which of the links a byte takes.
"""

import textwrap
from dataclasses import dataclass

import torch

from moco.builder import MoCo
from moco.encoders import base_encoder
from moco.errors import UserError

ITEMS = {  # of a step, and how the table calls them
    "images": "images to encode",
    "order": "order of the shuffle",
    "keys": "keys",
    "gradients": "gradients",
    "buffers": "buffers (rank 0's)",
}
LINK = 50e9  # bytes per second and GPU, each way: 400 Gbit/s, an assumption
FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of a MoCo's parts: the query encoder's gradients, both encoders' buffers, the queue with its
    pointer.
    """

    gradients: int
    batchnorm: int
    queue: int


def sizes_of(model):
    """The Sizes of a moco.builder.MoCo, on any device, the meta device included."""
    queue = [model.queue, model.queue_ptr]
    return Sizes(
        gradients=_bytes(p for p in model.parameters() if p.requires_grad),
        batchnorm=_bytes(model.buffers()) - _bytes(queue),
        queue=_bytes(queue),
    )


def sent_per_rank(sizes, images_per_rank, size, itemsize, dim, world):
    """Bytes that leave a rank in one step of this program, by item (the keys of ITEMS), as the module says.

    sizes: Sizes, or the MoCo that has them. images_per_rank: n. size: side S of a square image. itemsize:
    bytes of a pixel's channel, 4 or under autocast 2. dim: C, the length of a key. world: W.

    images: all-to-all of n x 3 x S x S. For one drawn order it is the share that changes ranks in it; the
    mean over all orders is what is given. order: every rank derives it, nothing is sent. keys: all-gather
    of n x C float32. gradients: all-reduce. buffers: broadcast of BatchNorm's before the forward pass;
    moco.distributed.wrap leaves the queue out.
    """
    sizes = sizes if isinstance(sizes, Sizes) else sizes_of(sizes)
    n = images_per_rank
    return {
        "images": _all_to_all(n * 3 * size**2 * itemsize, world),
        "order": 0,
        "keys": _all_gather(n * dim * FLOAT32, world),
        "gradients": _all_reduce(sizes.gradients, world),
        "buffers": _broadcast(sizes.batchnorm, world),
    }


def published_per_rank(sizes, images_per_rank, size, dim, world):
    """The same for the published program (MoCo's builder.py, which IFM's extends), in float32.

    images: all-gather of everyone's. order: broadcast of n*W int64. keys: all-gather twice, to undo the
    shuffle and for the queue. gradients: as here. buffers: broadcast with the queue and its pointer.
    """
    sizes = sizes if isinstance(sizes, Sizes) else sizes_of(sizes)
    n = images_per_rank
    return {
        "images": _all_gather(n * 3 * size**2 * FLOAT32, world),
        "order": _broadcast(n * world * INT64, world),
        "keys": 2 * _all_gather(n * dim * FLOAT32, world),
        "gradients": _all_reduce(sizes.gradients, world),
        "buffers": _broadcast(sizes.batchnorm + sizes.queue, world),
    }


def images_that_leave(order, images_per_rank, world):
    """How many images change ranks in an order (n*W,) of moco.shuffle: (W,) int64, by the rank they leave."""
    home = order // images_per_rank
    return torch.bincount(home[home != torch.arange(len(order)) // images_per_rank], minlength=world)


def measure(arch="resnet50", batch=32, size=224, dim=128, K=65536, amp=None, mlp=True, worlds=(8, 64, 512)):
    """The report of a step on so many GPUs, JSON-ready. Nothing runs: it is computed from shapes.

    batch: images per GPU and step (published: 32, 256 on 8 GPUs). amp: None, "bf16" or "fp16". Raises
    UserError.

    A row per world: bytes by item of "published", of "float32", this program as it is by default, and of
    "half", with images of 2 bytes; "seconds" of each over LINK, and "pairs_per_s" of one GPU at which they
    take as long as its computation.
    """
    if amp not in (None, "bf16", "fp16"):
        raise UserError(f"--amp must be bf16 or fp16, not {amp}")
    for name, value in {
        "batch size": batch,
        "image size": size,
        "dim": dim,
        "K": K,
        **_named(worlds),
    }.items():
        if value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    sizes = _sizes(arch, dim, K, mlp)
    rows = []
    for world in worlds:
        sent = {
            "published": published_per_rank(sizes, batch, size, dim, world),
            "float32": sent_per_rank(sizes, batch, size, 4, dim, world),
            "half": sent_per_rank(sizes, batch, size, 2, dim, world),
        }
        seconds = {name: sum(items.values()) / LINK for name, items in sent.items()}
        rate = {name: batch / s if s else None for name, s in seconds.items()}
        rows.append({"gpus": world, "bytes": sent, "seconds": seconds, "pairs_per_s": rate})
    setting = {"arch": arch, "batch": batch, "size": size, "dim": dim, "K": K, "amp": amp, "mlp": mlp}
    return {**setting, "link_bytes_per_s": LINK, "rows": rows}
