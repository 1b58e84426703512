"""A data set whose pixels stay on the device: views are cut out there, and no worker is needed."""

import numpy as np
import torch

from moco.draws import draw
from moco.slots import Batch


class ResidentLoader:
    """An iterable of Batches (moco.slots) from decoded pixels on a device; each iteration is an epoch.

    pixels: uint8 (images, 3, H, W) on the device; targets: int64 (images,); batch_sampler: gives lists of
    keys (epoch, index). The draws are those of moco.samples.TrainingSample for the same seed, the crops
    within 2 levels of its resize "torch". What is drawn for colours is left to whoever takes the batch,
    after the records.
    """

    num_workers = 0
    transport = "pixels stay on the device"

    def __init__(self, pixels, targets, recipe, size, seed, batch_sampler, views=2):
        self.pixels, self.targets = pixels, torch.from_numpy(targets).to(pixels.device)
        self.recipe, self.size, self.seed, self.views = recipe, size, seed, views
        self.batch_sampler = batch_sampler

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        height, width = self.pixels.shape[2:]
        for keys in self.batch_sampler:
            drawn = [draw(self.recipe, width, height, self.seed, epoch, i, self.views) for epoch, i in keys]
            records = np.stack(drawn, axis=1)  # views x N
            index = torch.tensor([i for _, i in keys], device=self.pixels.device)
            images = self.pixels[index]  # N x 3 x H x W
            views = [crop_resize_batch(images, view, self.size) for view in records]
            yield Batch(torch.stack(views), records, self.targets[index])


def crop_resize_batch(images, records, size):
    """Cut the box of each record (VIEW, (N,)) out of its image and resize it: uint8 (N, 3, size, size).

    images: uint8 (N, 3, H, W). Bilinear and antialiased: each output pixel is a mean under a triangle,
    rows after columns and rounded to bytes in between, as Pillow and torch do it, here as two matrix
    products for all images.
    """
    height, width = images.shape[2:]
    device = images.device
    across = _triangles(records["left"], records["width"], width, size, device)  # N x size x W
    down = _triangles(records["top"], records["height"], height, size, device)  # N x size x H
    rows = torch.einsum("nchw,nsw->nchs", images.float(), across).round()
    return torch.einsum("nchs,nth->ncts", rows, down).round().clamp(0, 255).to(torch.uint8)


def _triangles(start, length, extent, size, device):
    """Weights (N, size, extent) of the pixels along one axis: for each output pixel they sum to 1."""
    start = torch.from_numpy(start.astype(np.float32)).to(device, non_blocking=True)[:, None, None]
    length = torch.from_numpy(length.astype(np.float32)).to(device, non_blocking=True)[:, None, None]
    scale = length / size
    centre = (torch.arange(size, device=device)[:, None] + 0.5) * scale  # N x size x 1, from the box's edge
    place = torch.arange(extent, device=device) + 0.5 - start  # N x 1 x extent
    weight = (1 - (place - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((place > 0) & (place < length))
    return weight / weight.sum(dim=2, keepdim=True)
