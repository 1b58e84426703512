"""What one core makes of image files: the published pipeline, each improvement on it, and decoding alone.

A pipeline is a function of a round's number that returns a function without arguments, the work to be timed:
two views of every image, in batches.
"""

import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from moco.cache import build
from moco.decoders import decode_pillow, decode_simplejpeg, image_size, read_bytes
from moco.distributed import Process
from moco.draws import VIEW, draw, moco_v2
from moco.loader import IMAGENET_MEAN, IMAGENET_STD, GaussianBlur, TwoCropsTransform
from moco.samples import Photographs, TrainingSample
from moco.slots import Layout
from moco.views import crop_resize

NAMES = {
    "published": "published: PIL, float32, default collate",
    "decode_once": "decode once, uint8, written in place",
    "colours_on_device": "+ colours and blur left to the device",
    "torch_resize": "+ torch's antialiased resize",
    "simplejpeg": "+ simplejpeg's decoder",
    "cached": "+ decoded pixels from a cache",
    "limit": "limit: decoding and two resizes alone",
}


def published_stages(size):
    """MoCo v2's transforms as published (moco/main_moco.py of facebookresearch/moco), by name of stage."""
    return {
        "crop+resize": transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        "jitter": transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        "grayscale": transforms.RandomGrayscale(p=0.2),
        "blur": transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
        "flip": transforms.RandomHorizontalFlip(),
        "ToTensor": transforms.ToTensor(),
        "Normalize": transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    }


class PublishedViews(Dataset):
    """Items ([q, k], 0) as ImageFolder with the published transforms gives them: float32 3 x size x size."""

    def __init__(self, paths, size):
        self.paths = paths
        self.transform = TwoCropsTransform(transforms.Compose(list(published_stages(size).values())))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(read_as_published(self.paths[index])), 0


def read_as_published(path):
    """A PIL image, as torchvision's ImageFolder reads it."""
    with open(path, "rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def fast_sample(paths, decode, size, resize="torch", photometric=False, cache=None):
    """The worker's half of this program for MoCo v2, which writes samples of `paths` into batches."""
    photographs = Photographs(paths, np.zeros(len(paths), np.int64), decode, cache)
    return TrainingSample(photographs, moco_v2(), size, resize, 0, photometric)


def pipelines(paths, size, batch_size, simplejpeg):
    """The pipelines over `paths` by their key in NAMES. simplejpeg: whether it can be used."""
    fastest = decode_simplejpeg if simplejpeg else decode_pillow
    cache = build(paths, "decoded", Process.alone(torch.device("cpu")), fastest)
    samples = {
        "decode_once": fast_sample(paths, decode_pillow, size, "pil", photometric=True),
        "colours_on_device": fast_sample(paths, decode_pillow, size, "pil"),
        "torch_resize": fast_sample(paths, decode_pillow, size),
        "simplejpeg": fast_sample(paths, decode_simplejpeg, size),
        "cached": fast_sample(paths, None, size, cache=cache),
    }
    if not simplejpeg:
        del samples["simplejpeg"]
    batch = Layout(2, batch_size, (3, size, size), VIEW).empty(batch_size)
    return {
        "published": partial(_published, PublishedViews(paths, size), batch_size),
        **{name: partial(_fast, sample, len(paths), batch) for name, sample in samples.items()},
        "limit": partial(_limit, paths, fastest, size),
    }


def turn_of(runs):
    """turn(name): the CPU seconds of what runs[name](turns so far) gives to be run."""
    turns = dict.fromkeys(runs, 0)

    def turn(name):
        work = runs[name](turns[name])
        turns[name] += 1
        start = time.process_time()
        work()
        return time.process_time() - start

    return turn


def stage_shares(paths, size, batch_size, repeats=3):
    """Percent of the published pipeline's CPU time that each of its stages takes, `repeats` times over."""
    transforms_by_name = published_stages(size)
    seconds = dict.fromkeys(["decode", *transforms_by_name, "collate"], 0.0)
    torch.manual_seed(0)
    for first in [*range(0, len(paths), batch_size)] * repeats:
        items = []
        for path in paths[first : first + batch_size]:
            image = _timed(seconds, "decode", read_as_published, path)
            views = [image, image]
            for name, transform in transforms_by_name.items():
                views = [_timed(seconds, name, transform, view) for view in views]
            items.append((views, 0))
        _timed(seconds, "collate", default_collate, items)
    return {name: 100 * value / sum(seconds.values()) for name, value in seconds.items()}


def _timed(seconds, name, function, argument):
    start = time.process_time()
    result = function(argument)
    seconds[name] += time.process_time() - start
    return result


def _published(images, batch_size, number):
    def work():
        torch.manual_seed(number)
        for first in range(0, len(images), batch_size):
            part = range(first, min(first + batch_size, len(images)))
            default_collate([images[index] for index in part])

    return work


def _fast(sample, images, batch, number):
    def work():
        for index in range(images):
            sample(batch, index % len(batch.targets), (number, index))

    return work


def _limit(paths, decode, size, number):
    """What no loader can do without: the bytes are in memory, the boxes drawn, and the views overwritten."""
    files = [read_bytes(path) for path in paths]
    drawn = [draw(moco_v2(), *image_size(path), 0, number, index) for index, path in enumerate(paths)]
    view = torch.empty(size, size, 3, dtype=torch.uint8).permute(2, 0, 1)

    def work():
        for data, boxes in zip(files, drawn, strict=True):
            image = decode(data)
            for box in boxes:
                crop_resize(image, box, size, "torch", out=view)

    return work
