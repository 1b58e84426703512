"""Image folders with one sub-folder per class, and the order in which an epoch goes through their images."""

import contextlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco import trifeature
from moco.errors import UserError
from moco.seeds import ORDER, fold

# Folders that systems make beside images: of a Mac's zip files, of Synology's thumbnails, of ext4.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")


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


@dataclass
class ImageFolder:
    """The images of a folder with one sub-folder per class: what torchvision's ImageFolder of it has.

    root: its path; samples: (path, class number) of each image; targets: the class numbers alone;
    target_transform: None, or a function of a class number that gives another; left_out: a clause on what is
    in the folder and not among the samples, or "". len(): images.
    """

    root: str
    classes: list
    samples: list
    left_out: str = ""
    target_transform: object = None
    targets: list = field(init=False)
    class_to_idx: dict = field(init=False)

    def __post_init__(self):
        self.targets = [number for _, number in self.samples]
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}

    def __len__(self):
        return len(self.samples)


def image_folder(folder, split):
    """The ImageFolder of `folder`/`split`: for every program the images of a data set, in their order.

    Classes and images have the order and the numbers of torchvision's ImageFolder. Raises UserError.
    """
    path = Path(folder) / split
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}; check --dataset_root and --dataset, or the folder you named"
        )
    if not path.is_dir():
        raise UserError(
            f"{folder} has no folder {split}/; it needs train/ and val/ with one folder per class each"
        )
    left_out = Counter()
    folders, outside = _entries(path, left_out)
    left_out["images outside of class folders"] = len(outside)
    # A link to a folder above it would repeat all images as a class. As the only class it may be meant:
    # `ln -s . train/all` makes one of images that lie in train/.
    classes = [entry for entry in folders if not _leads_back(entry)]
    left_out["links to a folder above them"] = len(folders) - len(classes) if classes else 0
    classes = sorted(entry.name for entry in classes or folders)
    of_class = [images_below(os.path.join(path, name), left_out) for name in classes]

    empty = [name for name, paths in zip(classes, of_class, strict=True) if not paths]
    if empty or not classes:
        lack = "no folder in it"
        if empty:
            such = empty[0]
            lack = f"no image in {len(empty)} of its {len(classes)} class folders, such as {such}/"
        outside = f"; images outside of class folders: {len(outside)}" if outside else ""
        raise UserError(
            f"{path} is not complete ({lack}{outside}): it needs a folder with images "
            f"({' '.join(IMG_EXTENSIONS)}) for each class; images without classes go into one folder, such "
            f"as {split}/all/"
        )
    samples = [(image, number) for number, paths in enumerate(of_class) for image in paths]
    counts = ", ".join(f"{what} {count}" for what, count in sorted(left_out.items()) if count)
    clause = f"left out in {path}: {counts}" if counts else ""
    return ImageFolder(str(path), classes, samples, clause)


def images_below(folder, left_out):
    """The paths of the images in `folder` and in all folders below it, in ImageFolder's order.

    Links to folders are followed, but not to a folder that holds the link. left_out: a Counter, to which
    what is not taken is added. Raises UserError when a folder cannot be listed.
    """
    unseen, found = [str(folder)], []
    while unseen:
        path = unseen.pop()
        folders, images = _entries(path, left_out)
        found.append((path, images))
        for entry in folders:
            if _leads_back(entry):
                left_out["links to a folder above them"] += 1
            else:
                unseen.append(entry.path)
    return [os.path.join(path, name) for path, names in sorted(found) for name in names]


def _entries(folder, left_out):
    """(os.DirEntry of each folder, sorted names of the images) in `folder`, without hidden ones."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")  # such as .ipynb_checkpoints, and macOS's ._photo.jpg
                if _is_folder(entry):
                    if hidden or entry.name in SYSTEM_FOLDERS:
                        left_out["hidden folders"] += 1
                    else:
                        folders.append(entry)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    if hidden:
                        left_out["hidden files"] += 1
                    else:
                        images.append(entry.name)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed ({error.strerror}); allow to read it, or remove it"
        ) from error
    return folders, sorted(images)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_back(entry):
    """Whether an os.DirEntry is a link to a folder that holds it, by its path with or without links."""
    if not entry.is_symlink():
        return False
    holder = os.path.dirname(os.path.abspath(entry.path))
    real = os.path.realpath(holder)
    above = {Path(holder), *Path(holder).parents, Path(real), *Path(real).parents}
    with contextlib.suppress(OSError):
        return any(os.path.samestat(entry.stat(), os.stat(path)) for path in above)
    return False


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
            f"class {unknown[0]} is in {val.root} but not in train/ ({len(unknown)} such); {advice}"
        )
    numbers = [train.class_to_idx[name] for name in val.classes]
    val.samples = [(path, numbers[number]) for path, number in val.samples]
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
    of each. Images that do not fill a global batch are left out of the epoch or, without drop_last, make a
    smaller last one, whose parts differ by one image at most: all but the first may be empty. len(): batches
    of an epoch.
    """

    def __init__(self, images, global_batch, seed, rank=0, world_size=1, drop_last=True):
        """images: how many there are; global_batch: images of a step in all processes together."""
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last

    def __len__(self):
        return (self.images if self.drop_last else self.images + self.global_batch - 1) // self.global_batch

    def size(self, step):
        """The number of images in a batch of all processes together."""
        return min(self.global_batch, self.images - step * self.global_batch)

    def indices(self, epoch):
        """The numbers of the images in each of this process's batches: a list of int64 (N,)."""
        order = np.random.default_rng(fold(self.seed, ORDER, epoch)).permutation(self.images)
        parts = []
        for step in range(len(self)):
            start, size = step * self.global_batch, self.size(step)
            first, end = (math.ceil(size * part / self.world_size) for part in (self.rank, self.rank + 1))
            parts.append(order[start + first : start + end])
        return parts
