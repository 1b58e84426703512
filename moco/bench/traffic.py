"""The bytes that one training step sends from GPU to GPU, computed for any number of them.

Counted is the mean over the ranks of the bytes that leave a rank, when nothing is sent twice. With W ranks
and b bytes that a rank hands to the collective,

    all-to-all   b * (W-1)/W      each part goes to one rank; here for images in a random order
    all-gather   b * (W-1)        each rank's part has to reach the W-1 others
    broadcast    b * (W-1)/W      W-1 copies have to arrive, whichever rank sends them
    all-reduce   b * 2*(W-1)/W    a ring's reduce-scatter and all-gather, each of b/W in W-1 rounds

(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) Latency,
headers and the start of a run are left out.
"""

from functools import partial

from moco.builder import MoCo
from moco.encoders import base_encoder, on_meta_device

FLOAT32, INT64 = 4, 8


def sent_per_rank(model, n, size, world, itemsize=FLOAT32):
    """Bytes that leave a rank in one step of this program, by item.

    model: a MoCo, on any device, the meta device included. n: images of a rank. size: side of an image.
    world: W. itemsize: bytes of a pixel's channel, 2 with --amp.

    images: all-to-all of n x 3 x S x S; the mean over random orders. order: every rank derives it. keys:
    all-gather of n x C. gradients: all-reduce. buffers: broadcast of BatchNorm's before the forward pass.
    """
    gradients, batchnorm, _ = _sizes(model)
    return {
        "images": n * 3 * size**2 * itemsize * (world - 1) / world,
        "order": 0,
        "keys": n * len(model.queue) * FLOAT32 * (world - 1),
        "gradients": 2 * gradients * (world - 1) / world,
        "buffers": batchnorm * (world - 1) / world,
    }


def published_per_rank(model, n, size, world):
    """The same for the published program (MoCo's builder.py, which IFM's extends), in float32.

    images: all-gather of everyone's. order: broadcast of n*W int64. keys: all-gather twice, to undo the
    shuffle and for the queue. gradients: as here. buffers: broadcast with the queue and its pointer.
    """
    gradients, batchnorm, queue = _sizes(model)
    return {
        "images": n * 3 * size**2 * FLOAT32 * (world - 1),
        "order": n * INT64 * (world - 1),
        "keys": 2 * n * len(model.queue) * FLOAT32 * (world - 1),
        "gradients": 2 * gradients * (world - 1) / world,
        "buffers": (batchnorm + queue) * (world - 1) / world,
    }


def measure(arch="resnet50", batch_size=32, size=224, moco_k=65536, worlds=(8, 64, 512)):
    """The report (moco.bench.report): MB of a step by item and number of GPUs, of batch_size images each."""
    model = on_meta_device(partial(MoCo, base_encoder(arch, image_size=size), K=moco_k, mlp=True))
    rows = {}
    for world in worlds:
        for name, sent in (
            ("published", published_per_rank(model, batch_size, size, world)),
            ("here, float32", sent_per_rank(model, batch_size, size, world)),
            ("here, --amp", sent_per_rank(model, batch_size, size, world, itemsize=2)),
        ):
            rows[f"{world} GPUs, {name}"] = {
                item: count / 1e6 for item, count in (sent | {"total": sum(sent.values())}).items()
            }
    title = f"MB that leave a GPU in a step, computed: {arch}, {batch_size} images of {size} px"
    return {"tables": {title: rows}}


def _sizes(model):
    """Bytes of a MoCo's gradients, of its BatchNorm's buffers, and of the queue with its pointer."""
    queue = model.queue.nbytes + model.queue_ptr.nbytes
    gradients = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    return gradients, sum(buffer.nbytes for buffer in model.buffers()) - queue, queue
