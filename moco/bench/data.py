"""`python -m moco.bench data`: the published data pipeline against this program's, measured in turns."""

import collections
import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from moco.bench.photographs import make_photographs
from moco.bench.report import about, in_turns, spread
from moco.data import decode
from moco.data.augment import draw, moco_v2
from moco.data.cache import decoded_cache
from moco.data.device import DeviceAugment
from moco.data.folders import paths_of, pretraining_images
from moco.data.loader import TrainLoader
from moco.data.pil import crop_resize
from moco.data.ring import RingLoader
from moco.errors import UserError, printable
from moco.loader import IMAGENET_MEAN, IMAGENET_STD, GaussianBlur, TwoCropsTransform

PUBLISHED, LIMIT = "published: PIL, float32, default collate", "limit: decoding and two resizes alone"


def measure(folder, *, images, rounds, size, workers, batch_size):
    """The report (moco.bench.report): pairs per second, their ratios in each round, and CPU time.

    folder: of photographs, or None to make some. images: how many. rounds: turns of each pipeline. size: side
    of a view. workers: of the loaders; 0 leaves them out. batch_size: of all loaders. Raises UserError.
    """
    torch.set_num_threads(1)  # as in a worker
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with photographs(folder, images) as paths:
        batch_size = min(batch_size, len(paths))
        paths = paths[: len(paths) // batch_size * batch_size]
        setting = {"images": described(paths, folder), "decoder": decode.decoder_name(), "rounds": rounds}
        epochs = pipelines(paths, size, batch_size)
        bases = {"of published": PUBLISHED, "of the limit": LIMIT}
        title = f"two views of {size} px, CPU time of one core"
        tables = {title: compared(epochs, rounds, "one core", bases, by_cpu=True)}
        if workers:
            through = f"{workers} workers, batches of {batch_size}"
            epochs = ready_made(size, batch_size, workers)
            tables[f"transport, {through}"] = compared(epochs, rounds, "transport")
            epochs = from_files(paths, size, batch_size, workers, device)
            bases = {"of published": "published DataLoader"}
            tables[f"end to end, {through}"] = compared(epochs, rounds, "end to end", bases)
    return {"about": about(device, **setting), "tables": tables}


def compared(epochs, rounds, label, bases=None, by_cpu=False):
    """Rows of a table. epochs: {name: (function of a round's number that gives an iterable of batches, the
    pairs in it)}; bases: {column: the name that rates are compared with}; by_cpu: rates are per CPU second.
    """

    def seconds_of_a_pair(epoch, pairs, number):
        cpu, start = cpu_seconds(), time.perf_counter()
        collections.deque(epoch(number), maxlen=0)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / pairs, (cpu_seconds() - cpu) / pairs

    turns = {name: partial(seconds_of_a_pair, *epoch) for name, epoch in epochs.items()}
    taken = in_turns(turns, rounds, label)
    seconds = {name: values[:, int(by_cpu)] for name, values in taken.items()}
    return {
        name: {
            "pairs/s": spread(1 / seconds[name]),
            **{column: spread(seconds[base] / seconds[name]) for column, base in (bases or {}).items()},
            "CPU ms a pair": spread(1000 * taken[name][:, 1]),
        }
        for name in epochs
    }


def cpu_seconds():
    """CPU time of this process and, on Linux, of its children: all threads of each."""
    children = multiprocessing.active_children() if sys.platform == "linux" else []
    # Linux's number for the CPU clock of another process, see clock_getcpuclockid(3).
    return time.process_time() + sum(time.clock_gettime((~child.pid << 3) | 2) for child in children)


@contextlib.contextmanager
def photographs(folder, count):
    """The paths of `count` images: spread over those that pre-training takes from `folder`, or made in one
    that is removed afterwards. Raises UserError.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="moco-bench-") as made:
            yield make_photographs(made, count)
        return
    found = paths_of(pretraining_images(folder))
    count = min(count, len(found))
    yield [found[number * len(found) // count] for number in range(count)]


def described(paths, folder):
    """Number, size and source of the images in words. Raises UserError that names a bad one."""
    try:
        height, width, _ = np.mean([decode.read_pixels(path).shape for path in paths], axis=0)
    except UserError as error:  # whose advice may be a flag of other programs
        raise UserError(f"{str(error).rpartition('; ')[0]}; name a folder of photographs") from error
    kilobytes = np.mean([os.path.getsize(path) for path in paths]) / 1000
    source = f"of {printable(folder)}" if folder else "made to be like photographs"
    return f"{len(paths)} {source} ({width:.0f} x {height:.0f} and {kilobytes:.0f} KB on average)"


# The epochs that `compared` takes.


def pipelines(paths, size, batch_size):
    """Two views of each image of `paths`, made in this process: as published, and with each improvement."""
    images, recipe = Images(paths, size), moco_v2()
    published = DataLoader(images, batch_size)
    files = [Path(path).read_bytes() for path in paths]
    boxes = [draw(recipe, *decode.image_size(path), 0, 0, index) for index, path in enumerate(paths)]
    view = torch.empty(size, size, 3, dtype=torch.uint8).permute(2, 0, 1)

    def ours(resize, photometric, cache=None):
        settings = {"size": size, "batch_size": batch_size, "seed": 0, "resize": resize}
        return TrainLoader(images, recipe, photometric=photometric, cache=cache, **settings).epoch

    def by_pillow(epoch):
        def batches(number):
            with mock.patch.object(decode, "simplejpeg", None):  # where it is installed
                yield from epoch(number)

        return batches

    def limit(number):
        for data, drawn in zip(files, boxes, strict=True):
            image = decode.decode(data)
            yield [crop_resize(image, box, size, "torch", out=view) for box in drawn]

    found = {
        PUBLISHED: lambda number: published,
        "decode once, uint8, written in place": by_pillow(ours("pil", photometric=True)),
        "+ colors and blur left to the device": by_pillow(ours("pil", photometric=False)),
        "+ torch's antialiased resize": by_pillow(ours("torch", photometric=False)),
    }
    if decode.decoder_name() == "simplejpeg":
        found["+ simplejpeg's decoder"] = ours("torch", photometric=False)
    cache = decoded_cache(paths, show_progress=False)
    found["+ decoded pixels from a cache"] = ours("torch", photometric=False, cache=cache)
    return {name: (epoch, len(paths)) for name, epoch in (found | {LIMIT: limit}).items()}


def ready_made(size, batch_size, workers):
    """Batches of one sample that is there already, so that the time is that of transport."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    pixels = np.moveaxis(pixels, -1, 1)  # interleaved channels, as a resize makes them
    views = [view.contiguous() for view in torch.from_numpy(pixels)]

    def fill(slot, position, key):
        slot.pixels[:, position] = pixels

    few, many = (each * workers * batch_size for each in (8, 32))
    floats = data_loader([([view.float() for view in views], 0)] * few, batch_size, workers)
    bytes_ = data_loader([(views, 0)] * many, batch_size, workers)
    ring = RingLoader(fill, 2, batch_size, size, workers)
    return {
        "float32, default collate": (lambda number: floats, few),
        "uint8, default collate": (lambda number: bytes_, many),
        "uint8, ring": (lambda number: ring.epoch([[0] * batch_size] * (many // batch_size)), many),
    }


def from_files(paths, size, batch_size, workers, device):
    """The published DataLoader and TrainLoader over the images `paths`, to `device`; on a CPU without
    DeviceAugment, which gains nothing there, so TrainLoader's views still need colors and normalization.
    """
    few, many = (each * workers * batch_size for each in (2, 8))
    repeated, on_cuda = paths * math.ceil(many / len(paths)), device.type == "cuda"
    loader = data_loader(Images(repeated[:few], size), batch_size, workers, pin_memory=on_cuda)
    settings = {"size": size, "batch_size": batch_size, "seed": 0, "workers": workers, "device": device}
    images, recipe = Images(repeated[:many], size), moco_v2()
    ring = TrainLoader(images, recipe, resize="torch", photometric=False, **settings)

    def published(number):
        return ([view.to(device, non_blocking=True) for view in views] for views, _ in loader)

    augment = None
    if on_cuda:
        augment = DeviceAugment(recipe, device, photometric=True, batch_shape=(2 * batch_size, size))

    def ours(number):
        return map(augment, ring.epoch(number)) if on_cuda else ring.epoch(number)

    name = f"TrainLoader, {decode.decoder_name()}"
    return {"published DataLoader": (published, few), name: (ours, many)}


def data_loader(dataset, batch_size, workers, **settings):
    """A DataLoader that keeps its workers between epochs, as TrainLoader does, unlike the published one."""
    return DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=True, **settings)


class Images(Dataset):
    """Image files with what TrainLoader asks of an ImageFolder. Items are ([q, k], 0), each float32 of
    3 x size x size, by MoCo v2's published transforms (main_moco.py of facebookresearch/moco).
    """

    target_transform = None

    def __init__(self, paths, size):
        self.samples = [(path, 0) for path in paths]
        self.targets = [0] * len(paths)
        v2 = [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        self.transform = TwoCropsTransform(transforms.Compose(v2))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, target = self.samples[index]
        with open(path, "rb") as file, Image.open(file) as image:
            return self.transform(image.convert("RGB")), target
