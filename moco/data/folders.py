"""The images of a data set, with labels or without, and the order in which an epoch goes through them."""

import contextlib
import math
import os
import stat
import textwrap
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

# What is left out of a listing: one, several.
HIDDEN_FILES = "hidden file", "hidden files"
HIDDEN_FOLDERS = "hidden folder", "hidden folders"
OTHER_FILES = "other file", "other files"
SPECIAL_FILES = "pipe, socket or device", "pipes, sockets or devices"  # with names of images
OUTSIDE = "image outside of class folders", "images outside of class folders"
LINKS = "link to a folder above it", "links to a folder above them"
EMPTY = "folder without images", "folders without images"


def data_folder(folder, dataset_root, dataset):
    """The Path of a data set: `folder`, or dataset_root/dataset when it is None.

    The data set "trifeature" is drawn when it is missing, in data/ without a dataset_root. Raises UserError.
    """
    if folder and dataset_root:
        raise UserError(f"give either DIR ({folder}) or --dataset_root, not both")
    if folder:
        return Path(folder)
    if dataset_root is None and dataset != "trifeature":
        raise UserError(
            f"where are the images? Give their folder DIR, or --dataset_root ROOT for ROOT/{dataset}, or "
            "--dataset trifeature, which needs no download"
        )
    path = Path(dataset_root or "data") / dataset
    if dataset == "trifeature":
        trifeature.ensure(path, size=64, renders=4)  # 4,000 images, some seconds
    return path


@dataclass
class ImageFolder:
    """The images of a data set: where each folder is a class, what torchvision's ImageFolder of it has.

    root: the path of the folder, or of a list of images; classes: their names, none when there are no labels;
    samples: (path, class number) of each image, without labels 0; targets: the class numbers alone;
    target_transform: None, or a function of a class number that gives another; remark: a clause on what is
    in the folder and not among the samples, or "". len(): images.
    """

    root: str
    classes: list
    samples: list
    remark: str = ""
    target_transform: object = None
    targets: list = field(init=False)
    class_to_idx: dict = field(init=False)

    def __post_init__(self):
        self.targets = [number for _, number in self.samples]
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}

    def __len__(self):
        return len(self.samples)

    def summary(self):
        """For the start of a run: "DIR: 12,345 images in 3 folders, 2 hidden folders left out".

        A list of lines: the remark has lines of its own where one line would be longer than 80 columns.
        """
        folders = len({os.path.dirname(path) for path, _ in self.samples})
        counts = f"{_count(len(self), 'image', 'images')} in {_count(folders, 'folder', 'folders')}"
        line = f"{self.root}: {counts}"
        if not self.remark:
            return [line]
        together = f"{line}, {self.remark}"
        if len(together) <= 80:
            return [together]
        return [line, *textwrap.wrap(self.remark, 80, initial_indent="  ", subsequent_indent="    ")]


def image_folder(folder, split):
    """The ImageFolder of `folder`/`split`, whose folders are the classes: what needs labels lists by this.

    Classes and images have the order and the numbers of torchvision's ImageFolder. Raises UserError.
    """
    path = Path(folder) / split
    _check_folder(folder)
    if not os.path.isdir(path):
        raise UserError(
            f"{folder} has no folder {split}/; it needs train/ and val/ with one folder per class each"
        )
    left_out = Counter()
    of_class, loose = _by_folder(path, left_out)
    empty = [name for name, paths in of_class.items() if not paths]
    if empty or not of_class:
        lack = "no folder in it"
        if empty:
            such = empty[0]
            lack = f"no image in {len(empty)} of its {len(of_class)} class folders, such as {such}/"
        outside = f"; images outside of class folders: {len(loose)}" if loose else ""
        raise UserError(
            f"{path} is not complete ({lack}{outside}): it needs a folder with images "
            f"({' '.join(IMG_EXTENSIONS)}) for each class; images without classes go into one folder, such "
            f"as {split}/all/"
        )
    left_out[OUTSIDE] = len(loose)
    return _labeled(path, of_class, left_out)


def pretraining_images(folder, listed=None):
    """The ImageFolder of what pre-training takes: every program that needs no labels lists by this.

    folder: of a data set; listed: None, or instead of the folder a text file that names images
    (`listed_images`). With folder/train its class folders, in the order of `image_folder`, also when some
    hold no image; images beside them are left out. Where it holds no such folders, and without folder/train,
    all images below, without labels: first those beside all folders, then folder by folder in that same
    order. So the order depends on relative paths alone. Raises UserError, also when there is no image.
    """
    if listed is not None:
        return listed_images(listed)
    _check_folder(folder)
    train = os.path.join(folder, "train")
    has_train = os.path.isdir(train)
    path, left_out = Path(train if has_train else folder), Counter()
    of_folder, loose = _by_folder(path, left_out, loose_too=not has_train)
    with_images = {name: paths for name, paths in of_folder.items() if paths}
    left_out[EMPTY] = len(of_folder) - len(with_images)
    if has_train and with_images:
        left_out[OUTSIDE] = len(loose)
        return _labeled(path, with_images, left_out)
    paths = [image for images in (loose, *with_images.values()) for image in images]
    remark = _left_out(left_out)
    if not paths:
        raise UserError(
            f"there is no image in {path} or in folders below it{f' ({remark})' * bool(remark)}; names of "
            f"images end in {' '.join(IMG_EXTENSIONS)}"
        )
    return ImageFolder(str(path), [], [(image, 0) for image in paths], remark)


def labeled_by_folder(images):
    """The ImageFolder `images` of a folder; where it has no labels and every image is in a folder in there,
    one in which these folders are the classes, numbered as by `image_folder`.
    """
    paths, root = paths_of(images), os.path.join(images.root, "")
    of_image = [path.removeprefix(root).split(os.sep) for path in paths]
    if images.classes or any(len(parts) == 1 for parts in of_image):
        return images
    classes = sorted({folder for folder, *_ in of_image})
    numbers = {name: number for number, name in enumerate(classes)}
    samples = [(path, numbers[folder]) for path, (folder, *_) in zip(paths, of_image, strict=True)]
    return ImageFolder(images.root, classes, samples, images.remark)


def listed_images(path):
    """The ImageFolder, without labels, of the image files that the text file `path` names, in its order.

    Each line is a path, whatever its ending; relative ones start at the folder of `path`. The text is UTF-8,
    in which names of other bytes may stand as they are. Blank lines are skipped; an image that is named
    twice is taken twice. Raises UserError.
    """
    if os.path.isdir(path):
        raise UserError(f"--images takes a text file of paths; {path} is a folder: give it as DIR")
    try:
        if not os.path.isfile(path):  # os.stat below says why, if not that it is a pipe
            os.stat(path)
            raise UserError(f"--images: {path} is a pipe, but it is read more than once; save it in a file")
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise UserError(
            f"--images: {path} cannot be read ({error.strerror}); give a text file with a path in each line"
        ) from error
    folder = os.path.dirname(path)
    paths = {number: os.path.join(folder, line) for number, line in enumerate(lines, 1) if line.strip()}
    if not paths:
        raise UserError(f"--images: {path} names no image; it needs a path in each line")
    wrong = [number for number, image in paths.items() if not os.path.isfile(image)]
    if wrong:
        image = paths[wrong[0]]
        what = "no file"
        if os.path.exists(image):
            what = "a folder" if os.path.isdir(image) else "a pipe, socket or device"
        such = _count(len(wrong), "such line", "such lines")
        raise UserError(
            f"--images: line {wrong[0]} of {path} names {what}: {image[:200]} ({such} of {len(paths):,}); a "
            "line is one path in UTF-8 and nothing else, absolute or relative to the list's folder"
        )
    repeated = len(paths) - len(set(map(os.path.normpath, paths.values())))
    remark = f"{repeated:,} of them named before in the list" if repeated else ""
    return ImageFolder(str(path), [], [(image, 0) for image in paths.values()], remark)


def _check_folder(folder):
    try:
        if stat.S_ISDIR(os.stat(folder).st_mode):
            return
    except OSError as error:
        raise UserError(
            f"there is no folder {folder} ({error.strerror}); check the folder you named, or --dataset_root "
            "and --dataset"
        ) from error
    raise UserError(f"{folder} is a file; give a folder, or for pre-training a list of images by --images")


def _by_folder(path, left_out, loose_too=False):
    """({name: paths of the images in it and below} of each folder in `path`, sorted; those of the images
    beside them), as strings.

    left_out: as in `images_below`. loose_too: whether the images beside folders are wanted, too.
    """
    folders, names = _entries(path, left_out)
    # A link to a folder above it would repeat all images as a class. As the only class it may be meant:
    # `ln -s . train/all` makes one of images that lie in train/.
    kept = [entry for entry in folders if not _leads_back(entry)]
    if kept or (loose_too and names):
        left_out[LINKS] += len(folders) - len(kept)
        folders = kept
    of_folder = {
        name: images_below(os.path.join(path, name), left_out)
        for name in sorted(entry.name for entry in folders)
    }
    return of_folder, [os.path.join(path, name) for name in names]


def _labeled(path, of_class, left_out):
    samples = [(image, number) for number, paths in enumerate(of_class.values()) for image in paths]
    return ImageFolder(str(path), list(of_class), samples, _left_out(left_out))


def _left_out(left_out):
    """A clause on a Counter of what is left out, or ""."""
    *first, last = [_count(count, *what) for what, count in sorted(left_out.items()) if count] or [""]
    return last and f"{', '.join(first)}{' and ' * bool(first)}{last} left out"


def _count(count, one, several):
    return f"{count:,} {one if count == 1 else several}"


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
                left_out[LINKS] += 1
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
                        left_out[HIDDEN_FOLDERS] += 1
                    else:
                        folders.append(entry)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    if hidden:
                        left_out[HIDDEN_FILES] += 1
                    elif _is_special(entry):
                        left_out[SPECIAL_FILES] += 1
                    else:
                        images.append(entry.name)
                elif not hidden:
                    left_out[OTHER_FILES] += 1
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


def _is_special(entry):
    """Whether an os.DirEntry is, or leads to, what is no regular file, so that reading it may never end."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:  # a link that leads nowhere, which is said where it is read
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
