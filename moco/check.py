"""Reads every image of a data set as training would, and names the bad ones: `python -m moco.check DIR`."""

import contextlib
import copy
import functools
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from moco import trifeature
from moco.data.decode import decoder_name, read_pixels, reason
from moco.data.folders import image_folder, paths_of, pretraining_images, use_numbers_of_train
from moco.data.gray import (
    FormError,
    RangeError,
    Use,
    most_of_high_bytes,
    overall,
    range_warnings,
    span,
    use_of,
)
from moco.data.ring import Workers
from moco.errors import Parser, UserError, printable, run_program
from moco.options import add_gray_range
from moco.progress import Progress
from moco.run.resources import available_cores

TASK = 16  # images that a worker reads at a time
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
CHANNELS = 277  # TIFF's tag
PHOTOMETRIC = 262  # TIFF's tag; 0 is white stored as 0
BATCH = 256  # -b of main_moco.py, where it is not given


class Examined(NamedTuple):
    """What was found out about an image file."""

    fault: str | None  # why it cannot be read
    kind: type | None  # of the fault: RangeError, FormError, or None for all others
    size: tuple | None  # (width, height) of one that can be read
    remarks: list
    use: Use | None


def check(folder, workers=None, gray_range=None, listed=None):
    """The lines of a report on the data set `folder`, and whether training and linear evaluation can use it.

    folder, listed: as for moco.data.folders.pretraining_images; workers: processes that read (None: one per
    core, 0: this one); gray_range: --gray-range of the programs. Raises UserError when pre-training would at
    once.
    """
    train, val, report, faults = pretraining_images(folder, listed), None, [], []
    if train.classes and (Path(folder) / "val").exists():  # pre-training does without
        try:
            image_folder(folder, "train")  # may lack images of a class, unlike for pre-training
            val = image_folder(folder, "val")
        except UserError as error:
            faults.append(f"fault: {error}")
    splits = [images for images in (train, val) if images]
    bad, uses, kinds, count = [], [], Counter(), sum(map(len, splits))
    for images in splits:
        paths = paths_of(images)
        examined = _examine_all(paths, workers, images.root, gray_range)
        report += _summary(images, examined, gray_range)
        uses += [each.use for each in examined if each.use]
        bad += [
            f"bad: {path}: {each.fault}" for path, each in zip(paths, examined, strict=True) if each.fault
        ]
        kinds.update(each.kind for each in examined if each.fault)
        if images is train:  # of more than half no replacement may be found: moco.data.loader
            can_skip = 0 < 2 * len(bad) <= len(train)
    report += range_warnings(uses, gray_range)
    if bad:
        parts = []
        if number := kinds[RangeError]:
            parts.append(f"{number} need the --gray-range named above, here and in training")
        if number := kinds[FormError]:
            parts.append(FormError.advice.format(it=f"{number} of them"))
        if number := kinds[None]:
            others = f"of the other {number}: " * bool(parts) + "repair or remove them"
            if can_skip:
                others += ", or train with --on-bad-image skip" + " (images of train/ only)" * bool(val)
            parts.append(others)
        bad.append(f"{len(bad)} of {count} images cannot be read: {'; '.join(parts)}")
    else:
        report.append(f"all {count} images can be read, by {decoder_name()}")
    if len(train) < 2:
        faults.append(f"fault: pre-training refuses it: {train.root} has 1 image, and a batch needs 2")
    evaluation = "linear evaluation will start"
    if val and (Path(folder) / trifeature.SETTINGS).exists():
        report.append("Trifeature: val/ has combinations that train/ does not have, by design")
        evaluation += " with --target shape, texture or color"
    elif val:
        try:
            use_numbers_of_train(train, copy.copy(val), "linear evaluation refuses it")
        except UserError as error:
            faults.append(f"fault: {error}")
    if not (bad or faults):
        most = f", with -b {len(train)} or less" if len(train) < BATCH else ""
        if not val:
            needs = "val/, which is missing" if train.classes else "train/ and val/ with class folders"
            evaluation = f"linear evaluation needs {needs}"
        report.append(f"pre-training will start{most}; {evaluation}")
    return report + bad + faults, not (bad or faults)


def _examine_all(paths, workers, label, gray_range):
    """The Examined of each path, by `workers` processes, with progress."""
    tasks = [paths[first : first + TASK] for first in range(0, len(paths), TASK)]
    workers = min(available_cores() if workers is None else workers, len(tasks))
    examined, progress = [], Progress(label, len(paths), "images")
    function = functools.partial(_examine_part, gray_range)
    with contextlib.closing(Workers(function, workers)) as processes, progress:
        for part in processes.map(tasks):
            examined += part
            progress.update(len(part))
    return examined


def _examine_part(gray_range, paths):
    return [_examine(path, gray_range) for path in paths]


def _examine(path, gray_range):
    """The Examined of a path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's name no file
        try:
            height, width, _ = read_pixels(path, gray_range).shape
            use = use_of(path, gray_range)
            return Examined(None, None, (width, height), list(_remarks(path)), use)
        except (UserError, OSError) as error:
            cause = error.__cause__ or error
            kind = type(cause) if isinstance(cause, (RangeError, FormError)) else None
            use = None
            if kind:
                with contextlib.suppress(Exception):  # not known to Pillow
                    use = use_of(path, gray_range)
            return Examined(reason(cause), kind, None, [], use)


def _remarks(path):
    with Image.open(path) as image:
        tags = getattr(image, "tag_v2", {})
        if image.mode == "CMYK":
            yield "in CMYK: converted to RGB without their color profile"
        if most_of_high_bytes(image):
            yield "with 16 bits a color: the high 8 are used"
        if tags.get(PHOTOMETRIC) == 0 and image.mode[0] in "IF":
            yield "gray of more than 8 bits with white stored as 0: read without inverting it"
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            yield "with transparency: it is dropped"
        if tags.get(CHANNELS, 1) > len(image.getbands()):
            yield f"with {tags[CHANNELS]} channels, of which {len(image.getbands())} are read"
        if _orientation(image) > 1:
            yield "with an orientation in EXIF: training ignores it and takes the pixels as stored"
        if image.format != "MPO" and _frames(image) > 1:  # MPO: a photograph and its preview
            yield "with several pages or frames: only the first is read"


def _orientation(image):
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not keep the pixels from being read
        return 1


def _frames(image):
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # damage behind the first
        return 1


def _summary(images, examined, gray_range):
    """Lines about an ImageFolder, from the Examined of its images."""
    sizes = np.array([each.size for each in examined if each.size], int).reshape(-1, 2)
    yield from images.summary()
    if images.classes:
        of_classes = _range(list(Counter(images.targets).values()))
        yield f"  classes {len(images.classes)}, images of each (smallest / median / largest): {of_classes}"
    if len(sizes):
        yield f"  pixels: width {_range(sizes[:, 0])}, height {_range(sizes[:, 1])}"
    remarks = Counter(remark for each in examined for remark in each.remarks)
    yield from (f"  {count} {remark}" for remark, count in remarks.items())
    for count, use in overall(each.use for each in examined if each.use):
        mapped = gray_range or use.limits
        becomes = f", {span(mapped)} become 0 to 255" if mapped else ""
        yield f"  {count} gray with {use.kind} values: {span(use)}{becomes}"


def _range(numbers):
    return " / ".join(str(int(value)) for value in (np.min(numbers), np.median(numbers), np.max(numbers)))


def main():
    parser = Parser(
        prog="python -m moco.check",
        description="Read every image of a data set as training would, and name the bad ones.",
        epilog="Exit code 0: pre-training and, with labels and val/, linear evaluation can use the data set; "
        "1: they cannot, and the last lines say why; 2: wrong use. Nothing is written.",
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", help="images as for pre-training, and val/")
    parser.add_argument("--images", metavar="LIST", help="instead of DIR, as for main_moco.py")
    parser.add_argument(
        "-j", "--workers", type=int, metavar="N", help="processes that read (default: one per core)"
    )
    add_gray_range(parser.add_argument)
    args = parser.parse_args()
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 (read in this process) or more, not {args.workers}")

    if (args.folder is None) == (args.images is None):
        raise UserError("give the folder DIR or a list of --images, one of them")

    report, fine = check(args.folder, args.workers, args.gray_range, args.images)
    print("\n".join(map(printable, report)))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    run_program(main, "python -m moco.check")
