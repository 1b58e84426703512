"""Which files of a folder are images, and what comes of reading each of them on all cores (moco.check)."""

import io
import os
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.cores import available_cores
from moco.decoders import decoder, pixels_of, read_bytes, reason
from moco.errors import UserError
from moco.progress import Progress
from moco.workers import Crew, ctrl_c_later, worker_errors

PART = 16  # images that a worker does at a time
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


@dataclass
class Found:
    """The images of a split in ImageFolder's order, how many each class has, and what ImageFolder ignores."""

    paths: list
    classes: Counter
    empty: list  # paths of class folders without an image
    ignored: list

    def summary(self):
        """The part of it that is reported, as plain values."""
        return {
            "images": len(self.paths),
            "classes": len(self.classes),
            "images_of_a_class": _three(list(self.classes.values())),
            "ignored": len(self.ignored),
            "ignored_example": self.ignored[0] if self.ignored else None,
        }


def found_in(root, split=True):
    """A Found of the sub-folders of `root`, one per class, links followed.

    split: `root` is train/ or val/, where an image outside the sub-folders is not used; otherwise one makes
    all of `root` a single class, as having no sub-folder does.
    """
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    outside = sorted(str(entry) for entry in root.iterdir() if not entry.is_dir())
    if not split and any(map(_is_image, outside)):
        folders = []
    found = Found([], Counter(), [], outside if folders else [])
    for folder in folders or [root]:
        before = len(found.paths)
        for place, _, names in sorted(os.walk(folder, followlinks=True)):
            for name in sorted(names):
                (found.paths if _is_image(name) else found.ignored).append(os.path.join(place, name))
        if len(found.paths) > before:
            found.classes[folder.name] = len(found.paths) - before
        else:
            found.empty.append(str(folder))
    return found


def _is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS)


class Read:
    """What reading the images gave: `bad` {number: reason}, `odd` {remark of moco.check: count}."""

    def __init__(self, count, decoder):
        self.decoder, self.bad, self.odd = decoder, {}, Counter()
        self._sizes = np.zeros((count, 2), np.int64)

    def add(self, part, answers):
        """answers: for each number of the range `part` what `examine` gives."""
        for index, (why, size, remarks) in zip(part, answers, strict=True):
            if why is not None:
                self.bad[index] = why
            else:
                self._sizes[index] = size
                self.odd.update(remarks)

    def sizes(self, first, end):
        """Smallest, median and largest width and height of the good images among numbers first to end."""
        good = self._sizes[first:end]
        good = good[good[:, 0] > 0]
        return {"width": _three(good[:, 0]), "height": _three(good[:, 1])}


def read_all(paths, label, workers=None, name=None):
    """A Read of all image files, by `workers` processes (None: one per core), with progress.

    Raises UserError when a worker dies.
    """
    decode, text = decoder(name)
    parts = [range(first, min(first + PART, len(paths))) for first in range(0, len(paths), PART)]
    crew = Crew()
    loader = DataLoader(
        _Examined(paths, decode),
        batch_size=None,
        sampler=parts,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        num_workers=min(available_cores() if workers is None else workers, len(parts)),
        worker_init_fn=crew.start,
    )
    read = Read(len(paths), text)
    try:
        with worker_errors(), Progress(label, len(paths), "images") as progress:
            with ctrl_c_later():
                parts_read = iter(loader)
            for part, answers in parts_read:
                read.add(part, answers)
                progress.update(len(part))
    finally:
        crew.end()
    return read


class _Examined(Dataset):
    """What workers hold: a range of numbers becomes that range and what `examine` gives for each."""

    def __init__(self, paths, decode):
        self.paths, self.decode = paths, decode

    def __getitem__(self, part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's name no file; what matters of them is remarked
            return part, [examine(self.paths[index], self.decode) for index in part]


def examine(path, decode):
    """(why an image cannot be read or None, (width, height), remarks on what is odd) of a file."""
    try:
        data = read_bytes(path)
        height, width, _ = pixels_of(data, path, decode).shape
    except UserError as error:
        return reason(error.__cause__), None, []
    return None, (width, height), list(_remarks(data, width * height))


def _remarks(data, pixels):
    with Image.open(io.BytesIO(data)) as image:
        stored = f"{image.mode} {image.tile[0][-1] if image.tile else ''}"  # Pillow's mode, and the file's
        if image.mode == "CMYK":
            yield "CMYK"
        if image.mode == "I" or ";16" in stored:
            yield "16 bits"
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            yield "alpha"
        if _orientation(image) > 1:
            yield "orientation"
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        yield "huge"


def _orientation(image):
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not keep the pixels from being read
        return 1


def _three(numbers):
    """Smallest, median and largest, or [] of none."""
    return [int(np.min(numbers)), int(np.median(numbers)), int(np.max(numbers))] if len(numbers) else []


def _unchanged(item):
    return item
