"""The forms in which people have ImageNet (ILSVRC2012), read as one stream of images with their classes.

train: a folder of class folders, or ILSVRC2012_img_train.tar (a tar file of one tar file per class).
val: a folder of class folders, a folder of all 50,000 images, or ILSVRC2012_img_val.tar; the latter two say
nothing of classes and need the validation labels as well, which people have in several forms too.
"""

import functools
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moco.errors import UserError

DEVKIT_NUMBERS = "ILSVRC2012_validation_ground_truth.txt"
LABEL_FILES = (  # the names under which validation labels are looked for beside the images
    "imagenet_2012_validation_synset_labels.txt",
    "LOC_val_solution.csv",
    "valprep.sh",
    "ILSVRC2012_devkit_t12.tar.gz",
    f"ILSVRC2012_devkit_t12/data/{DEVKIT_NUMBERS}",
    DEVKIT_NUMBERS,
)


class Image(NamedTuple):
    """One image of a source."""

    wnid: str  # its class
    name: str
    size: int  # bytes
    path: Path | None  # the file that it is; None for a member of a tar file
    open: Callable  # () -> a binary file to read it from


def is_image(name):
    return name.lower().endswith((".jpeg", ".jpg", ".png"))


def image_files(folder):
    """The paths of the images in `folder`, sorted. Raises UserError when one cannot be an image."""
    paths, broken = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name):
                sound = entry.is_file() and entry.stat().st_size > 0  # through links
                (paths if sound else broken).append(Path(entry.path))
    if broken:
        raise UserError(
            f"{len(broken):,} of {len(paths) + len(broken):,} images in {folder} are empty, folders or links "
            f"to nothing, such as {min(broken).name}: restore the originals"
        )
    return sorted(paths)


def find_source(split, places):
    """The folder or tar file of "train" or "val" in `places`: folders, or the tar files themselves."""
    archive = f"ILSVRC2012_img_{split}.tar"
    for place in places:
        if not place.exists():
            raise UserError(f"{place} does not exist")
        if place.is_file() and place.suffix == ".tar" and split in place.name:
            return place.resolve()
        for candidate in (place / split, place / archive, place.parent / archive):
            if candidate.exists():
                return candidate.resolve()
    where = " or ".join(str(place) for place in places)
    raise UserError(
        f"no {split} images in {where}: name a folder with {split}/ (class folders in it) or {archive} in it"
    )


def needs_labels(split, source):
    """Whether the images of `source` come without their classes."""
    if split == "train":
        return False
    return source.is_file() or any(name.startswith("ILSVRC2012_val_") for name in os.listdir(source))


def images(source, classes, labels):
    """Yield an Image for every image of `classes` in `source`.

    `labels` is {name without suffix: wnid} for a source that needs it, else None. Raises tarfile.TarError for
    a tar file that is damaged or cut off, and UserError for a class or a label that is missing.
    """
    if labels is None:
        yield from _class_folders(source, classes) if source.is_dir() else _train_tar(source, classes)
    elif source.is_dir():
        paths = image_files(source)
        for path, wnid in _with_class(paths, paths, classes, labels):
            yield _file(path, wnid)
    else:
        with tarfile.open(source, "r:") as tar:
            members = [member for member in tar if member.isfile() and is_image(member.name)]
            paths = [Path(member.name) for member in members]
            for member, wnid in _with_class(members, paths, classes, labels):
                yield _member(tar, member, wnid)


def _class_folders(folder, classes):
    for wnid in classes:
        for path in image_files(folder / wnid):
            yield _file(path, wnid)


def _train_tar(path, classes):
    with tarfile.open(path, "r:") as outer:
        inner = {Path(member.name).stem: member for member in outer if member.isfile()}
        missing = [wnid for wnid in classes if wnid not in inner]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} of {len(classes)} classes: {', '.join(missing)}")
        for wnid in classes:
            with tarfile.open(fileobj=outer.extractfile(inner[wnid]), mode="r:") as tar:
                for member in tar:
                    if member.isfile() and is_image(member.name):
                        yield _member(tar, member, wnid)


def _file(path, wnid):
    return Image(wnid, path.name, path.stat().st_size, path, functools.partial(open, path, "rb"))


def _member(tar, member, wnid):
    opener = functools.partial(tar.extractfile, member)
    return Image(wnid, Path(member.name).name, member.size, None, opener)


def _with_class(items, paths, classes, labels):
    """The pairs (item, class) for the items of `classes`.

    Every image must have a label: a list that lacks a line would give wrong classes to all after it.
    """
    bare = [path.name for path in paths if path.stem not in labels]
    if bare:
        raise UserError(f"{len(bare):,} of {len(paths):,} validation images have no label, such as {bare[0]}")
    pairs = [(item, labels[path.stem]) for item, path in zip(items, paths, strict=True)]
    return [(item, wnid) for item, wnid in pairs if wnid in classes]


def find_val_labels(places):
    """The file of validation labels that lies in one of `places`, or beside it when that is a file."""
    for place in places:
        for name in LABEL_FILES:
            candidate = (place if place.is_dir() else place.parent) / name
            if candidate.is_file():
                return candidate
    raise UserError(
        "the validation images are not in class folders, so their labels are needed: name a file with "
        f"--val-labels, or put {', '.join(LABEL_FILES[:3])} or {LABEL_FILES[3]} beside the images"
    )


def read_val_labels(path):
    """{"ILSVRC2012_val_00000001": wnid, ...} from a file of one of these forms.

    Lines that name an image and a class (LOC_val_solution.csv of Kaggle, valprep.sh); lines that are a class,
    in the order of the images (imagenet_2012_validation_synset_labels.txt); lines that are a number of the
    development kit (its ILSVRC2012_validation_ground_truth.txt with meta.mat beside it, or
    ILSVRC2012_devkit_t12.tar.gz, which holds both), for which SciPy must be installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the file of validation labels {path} does not exist")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _devkit_archive(path)
    lines = path.read_text(errors="replace").splitlines()
    found = [(re.search(r"ILSVRC2012_val_\d{8}", line), re.search(r"\bn\d{8}\b", line)) for line in lines]
    pairs = {name.group(): wnid.group() for name, wnid in found if name and wnid}
    in_order = [
        wnid.group() for name, wnid in found if wnid and not name
    ]  # in valprep.sh also its mkdir lines
    if pairs or in_order:
        return pairs or _number(in_order)
    meta = path.with_name("meta.mat")
    if meta.is_file():
        return _devkit(path, lines, meta)
    raise UserError(
        f"{path} names no classes such as n01440764: use imagenet_2012_validation_synset_labels.txt (a class "
        "a line), LOC_val_solution.csv, or the development kit's ground truth with its meta.mat beside it"
    )


def _number(wnids):
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}


def _devkit_archive(path):
    try:
        with tarfile.open(path) as tar:
            members = {Path(member.name).name: member for member in tar if member.isfile()}
            if not {DEVKIT_NUMBERS, "meta.mat"} <= set(members):
                raise UserError(f"{path} is not the development kit: no {DEVKIT_NUMBERS} and meta.mat in it")
            lines = tar.extractfile(members[DEVKIT_NUMBERS]).read().decode(errors="replace").splitlines()
            return _devkit(path, lines, tar.extractfile(members["meta.mat"]))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut off ({error}): fetch it again") from error


def _devkit(path, lines, meta):
    """Labels from lines of ILSVRC2012_ID and `meta`, the kit's MATLAB file with these and the classes."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"to read {path}, SciPy is needed: `pip install scipy`, or name LOC_val_solution.csv or "
            "imagenet_2012_validation_synset_labels.txt with --val-labels"
        ) from error
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return _number([wnids[int(line)] for line in lines if line.strip()])
    except Exception as error:  # SciPy raises nearly anything on a damaged file
        raise UserError(f"{path} with its meta.mat is not the development kit's list of labels") from error
