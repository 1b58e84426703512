"""Image folders with one sub-folder per class, and the order in which an epoch goes through their images."""

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from moco import trifeature
from moco.errors import UserError, printable
from moco.seeds import ORDER, fold


def data_folder(folder, dataset_root, dataset):
    """The Path of the folder that holds train/ and val/: `folder`, or dataset_root/dataset when it is None.

    The data set "trifeature" is drawn when it is missing, in data/ without a dataset_root. Raises UserError.
    """
    if folder and dataset_root:
        raise UserError(f"give either DIR ({folder}) or --dataset_root, not both")
    if folder:
        return Path(folder)
    if dataset_root is None and dataset != "trifeature":
        raise UserError(
            f"where are the images? Give a folder with train/ and val/, or --dataset_root ROOT for "
            f"ROOT/{dataset}, or --dataset trifeature, which needs no download"
        )
    path = Path(dataset_root or "data") / dataset
    if dataset == "trifeature":
        trifeature.ensure(path, size=64, renders=4)  # 4,000 images, some seconds
    return path


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
        return ImageFolder(str(path))
    except FileNotFoundError as error:  # no class at all, or a class without an image
        raise UserError(
            f"{path} is not complete ({str(error).splitlines()[0].rstrip('.')}): it needs a folder with "
            "images for each class; images without classes go into one folder, such as train/all/"
        ) from error


def labeled_folders(folder, factor=None):
    """(train, val, class names): the ImageFolders train/ and val/ of `folder`, whose class numbers agree.

    The classes are the sub-folders or, with a `factor` ("shape", "texture" or "color") of Trifeature, its
    values. Raises UserError when val/ has a sub-folder that train/ lacks.
    """
    train, val = image_folder(folder, "train"), image_folder(folder, "val")
    if factor is not None:
        for images in (train, val):
            images.target_transform = [
                trifeature.factor_of(name, factor) for name in images.classes
            ].__getitem__
        return train, val, list(trifeature.FACTORS[factor])
    use_numbers_of_train(train, val, "remove it from val/, or for Trifeature choose a --target")
    return train, val, train.classes


def use_numbers_of_train(train, val, advice):
    """Give the ImageFolder `val` the classes and class numbers of the ImageFolder `train`, in place.

    val/ may lack classes of train/. Raises UserError, which ends in `advice`, when it has one that is not in
    train/.
    """
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"class {printable(unknown[0])} is in {printable(val.root)} but not in train/ ({len(unknown)} "
            f"such); {advice}"
        )
    numbers = [train.class_to_idx[name] for name in val.classes]
    val.samples = val.imgs = [(path, numbers[number]) for path, number in val.samples]
    val.targets = [number for _, number in val.samples]
    val.classes, val.class_to_idx = train.classes, train.class_to_idx


def paths_of(images):
    """The paths of an ImageFolder's images, by number."""
    return [path for path, _ in images.samples]


def targets_of(images):
    """The class numbers of an ImageFolder's images, after its target_transform: int64 (N,)."""
    label = images.target_transform or (lambda target: target)
    return np.array([label(target) for target in images.targets], np.int64)


class EpochBatches:
    """The numbers of the images in each batch of an epoch: a function of (seed, epoch) alone.

    The global batches are the same for every number of processes; process `rank` takes the rank-th part
    of each. Images that do not fill a global batch are left out of the epoch. len(): batches of an epoch.
    """

    def __init__(self, images, global_batch, seed, rank=0, world_size=1):
        """images: how many there are; global_batch: images of a step in all processes together."""
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return self.images // self.global_batch

    def indices(self, epoch):
        """The numbers of the images in each of this process's batches: int64 (batches, N)."""
        order = np.random.default_rng(fold(self.seed, ORDER, epoch)).permutation(self.images)
        parts = order[: len(self) * self.global_batch].reshape(len(self), self.world_size, -1)
        return parts[:, self.rank]
