"""Image folders, the order in which a run reads them, and the loaders that do it."""

import math
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from moco import trifeature
from moco.errors import UserError
from moco.seeds import ORDER, SAMPLE, fold, seeded


def image_folder(folder, split):
    """torchvision's ImageFolder of `folder`/`split`, one class per sub-folder. Raises UserError."""
    path = Path(folder) / split
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}; check --dataset_root and --dataset, or the folder you named"
        )
    if not path.is_dir():
        raise UserError(
            f"{folder} has no folder {split}/; it needs train/ and val/ with one folder per class each"
        )
    try:
        return ImageFolder(str(path), loader=read_image)
    except FileNotFoundError as error:  # no class at all, or a class without an image
        raise UserError(f"{path} is not complete: {str(error).splitlines()[0]}") from error


def labelled_folders(folder, factor=None):
    """The ImageFolders train/ and val/ of `folder` and the number of classes.

    The classes are the sub-folders, or the values of a `factor` of Trifeature. Raises UserError when the
    two have not the same sub-folders: their class numbers would differ.
    """
    train, val = image_folder(folder, "train"), image_folder(folder, "val")
    if factor is not None:
        for images in (train, val):
            images.target_transform = [
                trifeature.factor_of(name, factor) for name in images.classes
            ].__getitem__
        return train, val, len(trifeature.FACTORS[factor])
    for here, there, classes in (("train", "val", train.classes), ("val", "train", val.classes)):
        only = sorted(set(classes) - set(train.classes if there == "train" else val.classes))
        if only:
            raise UserError(
                f"class {only[0]} stands in {folder}/{here} but not in {there}/ ({len(only)} such), so "
                "class numbers would not agree; for Trifeature choose a --target"
            )
    return train, val, len(train.classes)


def read_image(path):
    """The image file as an RGB PIL image. Raises UserError that names the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); mend or remove it") from error


class SeededImages(Dataset):
    """Images whose random transform depends on (seed, epoch, index) alone, not on the worker that applies it.

    Keys are pairs (epoch, index); items are (transform(image), target).
    """

    def __init__(self, images, transform, seed):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        image, target = self.images[index]
        with seeded(fold(self.seed, SAMPLE, epoch, index)):
            return self.transform(image), target


class EpochBatches:
    """The batches of one process in an epoch as lists of (epoch, index), shuffled anew by (seed, epoch).

    The global batches are the same for every number of processes; process `rank` takes the rank-th part
    of each. Samples that do not fill a global batch are left out of the epoch. The caller sets `epoch`.
    """

    def __init__(self, images, global_batch, seed, rank=0, world_size=1):
        """images: how many there are; global_batch: images of a step in all processes together."""
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self):
        return self.images // self.global_batch

    def __iter__(self):
        order = np.random.default_rng(fold(self.seed, ORDER, self.epoch)).permutation(self.images)
        parts = order[: len(self) * self.global_batch].reshape(len(self), self.world_size, -1)
        for part in parts[:, self.rank]:
            yield [(self.epoch, int(index)) for index in part]


def training_loader(images, transform, process, batch_size, workers, seed, bn_splits=1):
    """A loader of batches (transform(image), target) for one process; its `batch_sampler` is an EpochBatches.

    batch_size and workers count all processes of this node; workers None: one per core. Raises UserError
    when the batch cannot be shared equally or there are fewer images than a step takes.
    """
    local = process.local_world_size
    if batch_size % local:
        raise UserError(
            f"--batch-size {batch_size} cannot be shared equally by the {local} processes of this node"
        )
    if batch_size // local % bn_splits:
        raise UserError(
            f"a process's batch of {batch_size // local} has no --bn-splits {bn_splits} equal groups"
        )
    global_batch = batch_size // local * process.world_size
    if len(images) < global_batch:
        raise UserError(
            f"{images.root} has {len(images)} images, fewer than a step's {global_batch}; lower -b"
        )
    return DataLoader(
        SeededImages(images, transform, seed),
        batch_sampler=EpochBatches(len(images), global_batch, seed, process.rank, process.world_size),
        **_worker_settings(process, workers),
    )


def validation_loader(images, transform, process, batch_size, workers):
    """Batches (transform(image), target) of this process's share; over all processes an image comes once."""
    images.transform = transform
    return DataLoader(
        Subset(images, range(process.rank, len(images), process.world_size)),
        batch_size=max(1, batch_size // process.local_world_size),
        **_worker_settings(process, workers),
    )


def _worker_settings(process, workers):
    count = process.cores if workers is None else math.ceil(workers / process.local_world_size)
    return {
        "num_workers": count,
        "persistent_workers": count > 0,
        "pin_memory": process.device.type == "cuda",
        "worker_init_fn": _start_worker,
    }


def _start_worker(_):
    # Ctrl-C and a scheduler's signals go to the training process, which ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
