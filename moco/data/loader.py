"""Batches of views for training and of central views for validation: what a worker does for each image."""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from moco.data.augment import VIEW, Recipe, draw
from moco.data.cache import Cache
from moco.data.decode import read_pixels
from moco.data.folders import EpochBatches, paths_of, targets_of
from moco.data.pil import center_resize, crop_resize, photometric
from moco.data.ring import RingLoader
from moco.errors import UserError, say
from moco.seeds import REPLACE, fold

TRIES = 100  # replacements of a bad image: enough when half of all are bad; soon over without the disk


def batch_per_process(batch_size, processes, bn_splits=1, views=2):
    """The images of a step in one of the `processes` of a node, which share --batch-size. Raises UserError.

    bn_splits: BatchNorm groups of a process; with several `views`, each needs at least 2 images.
    """
    if batch_size % processes:
        raise UserError(
            f"--batch-size {batch_size} cannot be shared by the {processes} processes of this node"
        )
    local = batch_size // processes
    if local % bn_splits:
        raise UserError(f"a process's batch of {local} has no --bn-splits {bn_splits} equal groups")
    if local // bn_splits < 2 and views > 1:
        raise UserError("BatchNorm needs at least 2 images in each group; raise -b or lower --bn-splits")
    return local


class TrainLoader:
    """Batches of augmented views of shuffled images; each is a function of (seed, epoch, step) and its rank.

    images: an ImageFolder; recipe: a moco.data.augment.Recipe; size: pixels of a view's side
    batch_size: of this process, which is one of world_size; a step takes global_batch images in all of them
    drop_last: whether images that do not fill a step are left out of the epoch; if not, the last step has
        fewer, which the processes share: one may have none. On CUDA pixels and records of its batch have
        batch_size samples nevertheless, the batch's own being the first
    views: of an image
    resize: "pil" or "torch" (moco.data.pil)
    photometric: whether workers also apply the recipe's jitter, grayscale, blur and flip; without it a
        moco.data.device.DeviceAugment applies them later, by the batch's records
    workers: processes, 0 for none
    cache: a moco.data.cache.Cache of the images, or None
    gray_range: of gray images of more than 8 bits, (low, high) become black and white; None: moco.data.gray
    on_bad_image: "error", or "skip" to take another image in the place of one that cannot be read
    device: where pixels and targets of batches are wanted

    len(): steps of an epoch. transport: a clause for the start of a run. How long a batch is valid:
    moco.data.ring.RingLoader. Raises UserError when images are left out and too few are there for a step.
    """

    def __init__(
        self,
        images,
        recipe,
        *,
        size,
        batch_size,
        seed,
        rank=0,
        world_size=1,
        drop_last=True,
        views=2,
        resize="pil",
        photometric=True,
        workers=0,
        cache=None,
        gray_range=None,
        on_bad_image="error",
        device="cpu",
    ):
        self.global_batch = batch_size * world_size
        if drop_last and len(images) < self.global_batch:
            least = world_size * min(views, 2)  # batch_per_process
            advice = "lower -b"
            if len(images) < least:
                advice = f"add images: {least} are the fewest" + " for these processes" * (world_size > 1)
            raise UserError(
                f"{images.root} has {len(images)} image{'s' * (len(images) != 1)}, fewer than a step's "
                f"{self.global_batch}; {advice}"
            )
        self._batches = EpochBatches(len(images), self.global_batch, seed, rank, world_size, drop_last)
        source = _Images(paths_of(images), targets_of(images), cache, gray_range)
        fill = _TrainingSample(source, recipe, size, resize, seed, photometric, on_bad_image == "skip")
        self._ring = RingLoader(fill, views, batch_size, size, workers, device, pad=not drop_last)
        self.transport = self._ring.transport

    def __len__(self):
        return len(self._batches)

    def images_in(self, step):
        """The number of images in a step in all processes."""
        return self._batches.size(step)

    def epoch(self, epoch, first_step=0):
        """An iterator over this process's Batches (moco.data.ring) of an epoch from `first_step` on.

        The workers begin at once; an epoch under way is ended. Iterating raises UserError, which names the
        file when an image is bad.
        """
        parts = self._batches.indices(epoch)[first_step:]
        return self._ring.epoch([(epoch, index) for index in part.tolist()] for part in parts)

    def close(self):
        """End the workers."""
        self._ring.close()


class ValidationLoader:
    """Batches of the images' central views (views=1), in order; iterating goes through them once.

    Every image is in one batch of one process: process `rank` of world_size has those numbered rank,
    rank + world_size, ... The last batch may be smaller. skip_bad: an image that cannot be read is black and
    has target -1, instead of a UserError, which ends in `advice`. The other arguments are as in TrainLoader.
    """

    def __init__(
        self,
        images,
        *,
        size,
        batch_size,
        rank=0,
        world_size=1,
        resize="pil",
        workers=0,
        cache=None,
        gray_range=None,
        skip_bad=False,
        advice="validation counts every image, so it skips none",
        device="cpu",
    ):
        share = range(rank, len(images.samples), world_size)
        self._batches = [share[first : first + batch_size] for first in range(0, len(share), batch_size)]
        source = _Images(paths_of(images), targets_of(images), cache, gray_range)
        fill = _ValidationSample(source, size, resize, skip_bad, advice)
        self._ring = RingLoader(fill, 1, batch_size, size, workers, device)
        self.transport = self._ring.transport

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return self._ring.epoch(self._batches)

    def close(self):
        """End the workers."""
        self._ring.close()


# What workers hold must not refer to the loader, which would otherwise keep itself and them alive.


@dataclass
class _Images:
    """The images of a data set, read from their files or from a cache, by number."""

    paths: list
    targets: np.ndarray  # int64 (N,)
    cache: Cache | None
    gray_range: tuple | None
    named: set = field(default_factory=set)  # bad ones that this worker has named

    def pixels(self, index):
        if self.cache is not None:
            return self.cache.read(index)
        return read_pixels(self.paths[index], self.gray_range)

    def name_once(self, index, error, consequence):
        if index not in self.named:
            self.named.add(index)
            say(f"bad image: {error}; {consequence}", sys.stderr)


@dataclass
class _TrainingSample:
    """Writes the views of key (epoch, index), drawn from (seed, epoch, index), into a slot of the ring."""

    images: _Images
    recipe: Recipe
    size: int
    resize: str
    seed: int
    photometric: bool
    skip: bool

    def __call__(self, slot, position, key):
        epoch, index = key
        used, image = self._read(epoch, index) if self.skip else (index, self.images.pixels(index))
        height, width = image.shape[:2]
        # A replacement gets the draws of the image that it replaces, unlike in its own turn.
        records = draw(self.recipe, width, height, self.seed, epoch, index, len(slot.pixels))
        for record, view in zip(records, torch.from_numpy(slot.pixels[:, position]).unbind(), strict=True):
            crop_resize(image, record, self.size, self.resize, out=view)
            if self.photometric:
                view.copy_(photometric(view, record, self.recipe.gray_first))
        slot.records[:, position] = records
        slot.targets[position], slot.indices[position] = self.images.targets[used], index

    def _read(self, epoch, index):
        """(number, pixels) of image `index`, or of its first replacement that can be read."""
        used = index
        for attempt in range(TRIES + 1):
            try:
                return used, self.images.pixels(used)
            except UserError as error:
                last = error
                self.images.name_once(used, error, "another is taken in its place")
            used = fold(self.seed, REPLACE, epoch, index, attempt) % len(self.images.paths)
        raise UserError(
            f"{self.images.paths[index]} cannot be read, nor can {TRIES} images drawn in its "
            f"place, the last because {last} (python -m moco.check names all)"
        )


@dataclass
class _ValidationSample:
    """Writes the central view of image number `key` into a slot of the ring."""

    images: _Images
    size: int
    resize: str
    skip: bool
    advice: str

    def __call__(self, slot, position, key):
        view = torch.from_numpy(slot.pixels[0, position])
        slot.records[:, position] = np.zeros((), VIEW)
        slot.targets[position], slot.indices[position] = self.images.targets[key], key
        try:
            center_resize(self.images.pixels(key), self.size, self.resize, out=view)
        except UserError as error:
            if not self.skip:
                raise UserError(f"{error} ({self.advice})") from error
            self.images.name_once(key, error, "it is left out")
            view.zero_()
            slot.targets[position] = -1
