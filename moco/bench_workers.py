"""What becomes of batches on their way from workers: transport, starts of epochs, both loaders whole."""

import contextlib
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco.bench_pipelines import PublishedViews, fast_sample
from moco.draws import VIEW, moco_v2
from moco.errors import UserError
from moco.memory import in_words
from moco.photometric import fastest_finish, to_device
from moco.ring import RingLoader
from moco.slots import Layout

PREFETCH = 2  # batches, or pieces of them, that a worker is ahead: the DataLoader's and the ring's default


@dataclass
class Epochs:
    """A loader that is measured. pairs: of an epoch; taken: what the training process does with a batch."""

    loader: Any
    pairs: int
    taken: Any = lambda batch: None

    def run(self):
        """(seconds to the first batch, seconds, CPU seconds of all processes) of an epoch."""
        cpu, start, first = _cpu_seconds(), time.perf_counter(), None
        for batch in self.loader:
            first = first or time.perf_counter() - start
            self.taken(batch)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return first, time.perf_counter() - start, _cpu_seconds() - cpu


@contextlib.contextmanager
def transports(size, batch_size, workers):
    """Three ways for batches of ready-made samples, which cost a worker a copy: Epochs by their name."""
    check_shared_memory(size, batch_size, workers)
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    pixels = np.moveaxis(pixels, -1, 1)  # interleaved channels, as a resize makes them
    views = [view.contiguous() for view in torch.from_numpy(pixels)]
    few, many = (each * workers * batch_size for each in (8, 32))
    epochs = {
        "float32, default collate": _plain([view.float() for view in views], few, batch_size, workers),
        "uint8, default collate": _plain(views, many, batch_size, workers),
        "uint8, ring": _ring(partial(_write, pixels), many, batch_size, size, workers, torch.device("cpu")),
    }
    with _closed(epochs):
        yield epochs


@contextlib.contextmanager
def end_to_end(paths, decode, size, batch_size, workers, device, mode):
    """The published DataLoader and this program's ring over the images `paths`: Epochs by their name.

    Both keep their workers between epochs, which the published one does not. device: where the training
    process wants batches; mode: of the device half ("exact" or "float") there, None without.
    """
    check_shared_memory(size, batch_size, workers)
    few, many = (each * workers * batch_size for each in (2, 8))
    keys = [index % len(paths) for index in range(few)]
    settings = _settings(batch_size, workers) | {"pin_memory": device.type == "cuda"}
    published = DataLoader(PublishedViews(paths, size), sampler=keys, **settings)
    sample = fast_sample(paths, decode, size)
    fast = _ring(sample, many, batch_size, size, workers, device, len(paths))
    finish = fastest_finish(moco_v2(), mode, device)[0] if mode else None
    epochs = {
        "published": Epochs(published, few, partial(_moved, device)),
        "fast": replace(fast, taken=partial(_finished, finish, device)),
    }
    with _closed(epochs):
        yield epochs


def check_shared_memory(size, batch_size, workers):
    """Raise UserError when /dev/shm, which the DataLoader's own transport uses, is too small for it."""
    needed = (workers * PREFETCH + 2) * batch_size * 2 * 3 * size * size * 4
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return
    if free < needed:
        raise UserError(
            f"/dev/shm has {in_words(free)} free and the published loader needs {in_words(needed)}; start "
            "the container with --shm-size=1g or more, or lower --batch-size, or use --workers 0"
        )


class _Ready(Dataset):
    """A data set of `count` times the same item."""

    def __init__(self, item, count):
        self.item, self.count = item, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.item


def _plain(views, pairs, batch_size, workers):
    return Epochs(DataLoader(_Ready((views, 0), pairs), **_settings(batch_size, workers)), pairs)


def _settings(batch_size, workers):
    return {
        "batch_size": batch_size,
        "num_workers": workers,
        "prefetch_factor": PREFETCH,
        "persistent_workers": True,
    }


def _ring(fill, pairs, batch_size, size, workers, device, images=1):
    keys = [(0, number % images) for number in range(pairs)]
    batches = [keys[first : first + batch_size] for first in range(0, pairs, batch_size)]
    layout = Layout(2, batch_size, (3, size, size), VIEW)
    return Epochs(RingLoader(fill, batches, layout, workers, device, prefetch=PREFETCH), pairs)


def _write(pixels, batch, position, key):
    batch.pixels[:, position] = pixels
    batch.records[:, position] = np.zeros((), VIEW)
    batch.targets[position] = 0


def _moved(device, batch):
    (q, k), _ = batch
    q.to(device, non_blocking=True), k.to(device, non_blocking=True)


def _finished(finish, device, batch):
    if finish:
        finish(batch.pixels.flatten(0, 1), to_device(batch.records.reshape(-1), device))


@contextlib.contextmanager
def _closed(epochs):
    """End the workers of the loaders on the way out."""
    try:
        yield
    finally:
        for each in epochs.values():
            if isinstance(each.loader, RingLoader):
                each.loader.close()
            elif each.loader._iterator is not None:
                each.loader._iterator._shutdown_workers()


def _cpu_seconds():
    """CPU time of this process and, on Linux, of its children: all threads of each."""
    children = multiprocessing.active_children() if sys.platform == "linux" else []
    # Linux's number for the CPU clock of another process, see clock_getcpuclockid(3).
    return time.process_time() + sum(time.clock_gettime((~child.pid << 3) | 2) for child in children)
