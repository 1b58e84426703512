"""Image folders, the order in which a run reads them, and the loaders that do it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from moco.bad_images import BadImages
from moco.cache import KINDS, build, build_on_device
from moco.decoders import decoder
from moco.draws import VIEW
from moco.errors import UserError
from moco.factors import FACTORS, factor_of
from moco.resident import ResidentLoader
from moco.ring import RingLoader
from moco.samples import Photographs, TrainingSample, ValidationSample
from moco.seeds import ORDER, fold
from moco.slots import Layout


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
        raise UserError(f"{path} is not complete: {str(error).splitlines()[0]}") from error


def labelled_folders(folder, factor=None):
    """The ImageFolders train/ and val/ of `folder` and the number of classes.

    The classes are the sub-folders, or the values of a `factor` of Trifeature. Raises UserError when the
    two have not the same sub-folders: their class numbers would differ.
    """
    train, val = image_folder(folder, "train"), image_folder(folder, "val")
    if factor is not None:
        for images in (train, val):
            images.target_transform = [factor_of(name, factor) for name in images.classes].__getitem__
        return train, val, len(FACTORS[factor])
    check_same_classes(folder, train, val, "for Trifeature choose a --target")
    return train, val, len(train.classes)


def check_same_classes(folder, train, val, instead):
    """Raise UserError that ends in what to do `instead` when two ImageFolders have not the same classes."""
    for here, there, classes in (("train", "val", train.classes), ("val", "train", val.classes)):
        only = sorted(set(classes) - set(train.classes if there == "train" else val.classes))
        if only:
            raise UserError(
                f"class {only[0]} stands in {folder}/{here} but not in {there}/ ({len(only)} such), so "
                f"class numbers would not agree; {instead}"
            )


class EpochBatches:
    """The batches of one process in an epoch as lists of (epoch, index), shuffled anew by (seed, epoch).

    The global batches are the same for every number of processes; process `rank` takes the rank-th part
    of each. Samples that do not fill a global batch are left out of the epoch. The caller sets `epoch`,
    and `first`, the number of batches that the next iteration leaves out because they were taken before.
    """

    def __init__(self, images, global_batch, seed, rank=0, world_size=1):
        """images: how many there are; global_batch: images of a step in all processes together."""
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self):
        return self.images // self.global_batch

    def __iter__(self):
        for part in self.indices()[self.first :]:
            yield [(self.epoch, int(index)) for index in part]

    def indices(self):
        """The images of each of this process's batches in the epoch: (batches, N) int64, `first` or not."""
        order = np.random.default_rng(fold(self.seed, ORDER, self.epoch)).permutation(self.images)
        parts = order[: len(self) * self.global_batch].reshape(len(self), self.world_size, -1)
        return parts[:, self.rank]


@dataclass(frozen=True)
class Loading:
    """How images become batches of uint8 views, in one process of a run.

    size: side of a view in pixels; resize: "pil" or "torch" (moco.views); batch_size and workers: of all
    processes of this node; workers None: one per core; decode: "pillow", "simplejpeg" or None
    (moco.decoders); cache: "decoded", "files" (moco.cache), "device" (moco.resident; for training), or None.
    """

    size: int
    resize: str
    batch_size: int
    workers: int | None = None
    decode: str | None = None
    cache: str | None = None

    def training(
        self, images, recipe, process, seed, *, views=2, photometric=True, bn_splits=1, bad_images=None
    ):
        """A RingLoader over shuffled batches whose `batch_sampler` is an EpochBatches, for training.

        photometric: whether the workers also do the recipe's operations on colours. bad_images: a BadImages
        (default: an image that cannot be read is an error). Raises UserError when the batch cannot be shared
        equally or there are fewer images than a step takes.
        """
        global_batch = self.check_batch(len(images), images.root, process, bn_splits, views)
        batches = EpochBatches(len(images), global_batch, seed, process.rank, process.world_size)
        if self.cache == "device":
            if photometric:
                raise UserError("--cache device leaves nothing to workers: add --device-aug exact or float")
            pixels = build_on_device(paths_of(images), process, decoder(self.decode)[0])
            return ResidentLoader(pixels, _targets(images), recipe, self.size, seed, batches, views)
        photographs = self._photographs(images, process)
        sample = TrainingSample(
            photographs, recipe, self.size, self.resize, seed, photometric, bad_images or BadImages()
        )
        return self._loader(sample, batches, views, process)

    def check_batch(self, images, root, process, bn_splits=1, views=2):
        """The global batch of training on so many `images` of a folder `root`; UserError as in `training`."""
        local = process.local_world_size
        if self.batch_size % local:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by the {local} processes of this node"
            )
        if self.batch_size // local % bn_splits:
            raise UserError(
                f"a process's batch of {self.batch_size // local} has no --bn-splits {bn_splits} equal groups"
            )
        if self.batch_size // local // bn_splits < 2 and views > 1:
            raise UserError("BatchNorm needs at least 2 images in each group; raise -b or lower --bn-splits")
        global_batch = self.batch_size // local * process.world_size
        if images < global_batch:
            raise UserError(f"{root} has {images} images, fewer than a step's {global_batch}; lower -b")
        return global_batch

    def validation(self, images, process, optional=0):
        """A RingLoader over this process's share of the images; over all processes every image comes once.

        optional: how many of the first may be impossible to read; their target is -1 then.
        """
        size = max(1, self.batch_size // process.local_world_size)
        share = range(process.rank, len(images.samples), process.world_size)
        batches = [share[start : start + size] for start in range(0, len(share), size)]
        sample = ValidationSample(self._photographs(images, process), self.size, self.resize, optional)
        return self._loader(sample, batches, 1, process)

    def _photographs(self, images, process):
        paths, targets, decode = paths_of(images), _targets(images), decoder(self.decode)[0]
        if self.cache not in KINDS:
            return Photographs(paths, targets, decode)
        return Photographs(paths, targets, decode, build(paths, self.cache, process, decode))

    def _loader(self, sample, batches, views, process):
        workers = (
            process.cores if self.workers is None else math.ceil(self.workers / process.local_world_size)
        )
        size = max(1, self.batch_size // process.local_world_size)
        layout = Layout(views, size, (3, self.size, self.size), VIEW)
        return RingLoader(sample, batches, layout, workers, process.device)


def paths_of(images):
    """The paths of an ImageFolder's images, by number."""
    return [path for path, _ in images.samples]


def _targets(images):
    label = images.target_transform or (lambda target: target)
    return np.array([label(target) for target in images.targets], np.int64)
