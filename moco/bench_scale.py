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
from functools import partial

import torch

from moco.builder import MoCo
from moco.encoders import base_encoder, without_memory
from moco.errors import UserError

ITEMS = {  # of a step, as the table calls them
    "images": "images to encode",
    "order": "order of the shuffle",
    "keys": "keys",
    "gradients": "gradients of the query's",
    "buffers": "buffers before the forward",
}
COLUMNS = {"published": "published", "float32": "float32", "half": "--amp bf16", "half_4n": "and 4x batch"}
OURS = ("float32", "half", "half_4n")
MOVED_BY = {  # what makes an item smaller, or more pairs share it
    "images": "half as many bytes with --amp bf16 or fp16; fewer with a smaller --image-size; more GPUs do "
    "not change them",
    "keys": "the one item that grows with the GPUs; fewer bytes with a smaller --moco-dim, and with fewer "
    "images per GPU (--batch-size)",
    "gradients": "the same for any number of images and, beyond a few, of GPUs; more images per GPU "
    "(--batch-size) spread them over more pairs; a smaller --arch has fewer",
    "buffers": "the same for any number of images; more images per GPU (--batch-size) spread them",
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


def measure(arch="resnet50", batch=32, size=224, dim=128, K=65536, mlp=True, worlds=(8, 64, 512)):
    """The report of a step on so many GPUs, ready for JSON. Nothing runs: it is computed from shapes.

    batch: images per GPU and step (published: 32, which is 256 on 8 GPUs). mlp: with MoCo v2's hidden layer.
    Raises UserError for an unknown arch and for sizes below 1.

    A row per world size has for each column (COLUMNS) the bytes by item, their total in bytes, the seconds
    that it takes on a link of LINK, and `pairs_per_s`: the rate of one GPU above which the link is slower
    than the GPU (None in a world of 1). `limits`: the largest item.
    """
    for name, value in (("batch", batch), ("size", size), ("dim", dim), ("K", K), ("worlds", min(worlds))):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    sizes = _sizes(arch, dim, K, mlp)
    return {
        "setting": {"arch": arch, "batch": batch, "size": size, "dim": dim, "K": K, "mlp": mlp},
        "link_bytes_per_s": LINK,
        "rows": [{"gpus": world, **_columns(sizes, batch, size, dim, world)} for world in worlds],
    }


def _columns(sizes, n, size, dim, world):
    sent = {
        "published": (n, published_per_rank(sizes, n, size, dim, world)),
        "float32": (n, sent_per_rank(sizes, n, size, 4, dim, world)),
        "half": (n, sent_per_rank(sizes, n, size, 2, dim, world)),
        "half_4n": (4 * n, sent_per_rank(sizes, 4 * n, size, 2, dim, world)),
    }
    columns = {}
    for name, (images, items) in sent.items():
        total = sum(items.values())
        columns[name] = {
            "bytes": items,
            "total": total,
            "seconds": total / LINK,
            "pairs_per_s": images * LINK / total if total else None,
            "limits": max(items, key=items.get) if total else None,
        }
    return columns


def table(report):
    """The report as text of at most 80 columns: computed, not measured, and it says so."""
    setting, rows = report["setting"], report["rows"]
    head = (
        "{arch}{}, {batch} images of {size} px per GPU, keys of {dim}, queue of {K}. Computed, not measured: "
        "payload that leaves a GPU in one step, mean over the GPUs; links of {:.0f} GB/s each are an "
        "assumption.".format(" with --mlp" * setting["mlp"], report["link_bytes_per_s"] / 1e9, **setting)
    )
    parts = [textwrap.wrap(head, 80)]
    parts += [list(_block(row)) for row in rows]
    parts.append([line for text in _advice(report) for line in textwrap.wrap(text, 80)])
    return "\n\n".join("\n".join(part) for part in parts)


def _block(row):
    def line(text, cells):
        return f"{text:28}" + "".join(f"{cell:>13}" for cell in cells)

    columns = [row[name] for name in COLUMNS]
    yield line(f"{row['gpus']} GPU{'s' * (row['gpus'] > 1)}: MB a step", COLUMNS.values())
    for item, text in ITEMS.items():
        yield line(text, (f"{column['bytes'][item] / 1e6:,.2f}" for column in columns))
    yield line("total", (f"{column['total'] / 1e6:,.2f}" for column in columns))
    yield line("most of it", (column["limits"] or "-" for column in columns))
    yield line("ms on the link", (f"{column['seconds'] * 1e3:,.2f}" for column in columns))
    rates = (column["pairs_per_s"] for column in columns)
    yield line("link keeps up to, pairs/s", (f"{rate:,.0f}" if rate else "-" for rate in rates))


def _advice(report):
    """What limits this program, not the published one, and the flag that moves it."""
    limits = dict.fromkeys(row[name]["limits"] for row in report["rows"] for name in COLUMNS if name in OURS)
    for item in limits:
        if item:
            yield f"{ITEMS[item]}: {MOVED_BY[item]}."
    yield (
        "Keeps up to: at so many pairs/s a GPU computes for as long as the link sends. DDP sends most "
        "gradients during the backward pass; images are waited for."
    )
    setting, most = report["setting"], max(row["gpus"] for row in report["rows"])
    if most * setting["batch"] > setting["K"]:
        yield f"{most} GPUs make more keys in a step than the queue of {setting['K']} holds: raise --moco-k."


def _sizes(arch, dim, K, mlp):
    return sizes_of(without_memory(partial(MoCo, base_encoder(arch), dim, K, mlp=mlp)))


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def _all_to_all(b, world):
    return b * (world - 1) / world


def _all_gather(b, world):
    return b * (world - 1)


def _broadcast(b, world):
    return b * (world - 1) / world


def _all_reduce(b, world):
    return 2 * b * (world - 1) / world
