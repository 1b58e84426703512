"""Reads every image of a data set as training would, and names the bad ones: `python -m moco.check DIR`."""

import argparse
import contextlib
import copy
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from moco import trifeature
from moco.data.decode import decoder_name, read_pixels, reason
from moco.data.folders import image_folder, paths_of, use_numbers_of_train
from moco.data.ring import Workers
from moco.errors import UserError, printable, run_program
from moco.progress import Progress
from moco.run.resources import available_cores

TASK = 16  # images that a worker reads at a time
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def check(folder, workers=None):
    """The lines of a report on the data set `folder`, and whether training and linear evaluation can use it.

    folder: holds train/ and perhaps val/; workers: processes that read (None: one per core, 0: this one).
    Raises UserError when there is no train/, and when there is no class folder or an empty one.
    """
    folder = Path(folder)
    splits = [image_folder(folder, "train")]
    if (folder / "val").is_dir():  # pre-training does without
        splits.append(image_folder(folder, "val"))
    report, faults, count = [], [], sum(map(len, splits))
    for images in splits:
        paths = paths_of(images)
        examined = _examine_all(paths, workers, printable(images.root))
        report += _summary(images, examined)
        faults += [
            f"bad: {printable(path)}: {printable(fault)}"
            for path, (fault, _, _) in zip(paths, examined, strict=True)
            if fault
        ]
    if faults:
        advice = "repair or remove them, or train with --on-bad-image skip (images of train/ only)"
        faults.append(f"{len(faults)} of {count} images cannot be read: {advice}")
    else:
        report.append(f"all {count} images can be read, by {decoder_name()}")
    if (folder / trifeature.SETTINGS).exists():
        report.append("Trifeature: val/ has combinations that train/ does not have, by design")
    elif len(splits) == 2:
        try:
            use_numbers_of_train(splits[0], copy.copy(splits[1]), "linear evaluation refuses it")
        except UserError as error:
            faults.append(f"fault: {error}")
    return report + faults, not faults


def _examine_all(paths, workers, label):
    """What `_examine` returns for each path, by `workers` processes, with progress."""
    tasks = [paths[first : first + TASK] for first in range(0, len(paths), TASK)]
    workers = min(available_cores() if workers is None else workers, len(tasks))
    examined, progress = [], Progress(label, len(paths), "images")
    with contextlib.closing(Workers(_examine_part, workers)) as processes, progress:
        for part in processes.map(tasks):
            examined += part
            progress.update(len(part))
    return examined


def _examine_part(paths):
    return [_examine(path) for path in paths]


def _examine(path):
    """(why an image file cannot be read, or None; (width, height) or None; remarks) of a path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's name no file
        try:
            height, width, _ = read_pixels(path).shape
            return None, (width, height), list(_remarks(path))
        except (UserError, OSError) as error:
            return reason(error.__cause__ or error), None, []


def _remarks(path):
    with Image.open(path) as image:
        stored = f"{image.mode} {image.tile[0][-1] if image.tile else ''}"  # Pillow's mode, and the file's
        if image.mode == "CMYK":
            yield "in CMYK: converted to RGB without their color profile"
        if image.mode == "I" or ";16" in stored:
            yield "with 16 bits a color: the high 8 are used"
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            yield "with transparency: it is dropped"
        if _orientation(image) > 1:
            yield "with an orientation in EXIF: training ignores it and takes the pixels as stored"


def _orientation(image):
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not keep the pixels from being read
        return 1


def _summary(images, examined):
    """Lines about an ImageFolder, from what `_examine` returned for its images."""
    sizes = np.array([size for _, size, _ in examined if size], int).reshape(-1, 2)
    yield f"{printable(images.root)}: images {len(images)}, classes {len(images.classes)}"
    of_classes = list(Counter(images.targets).values())
    yield f"  images of a class (smallest / median / largest): {_range(of_classes)}"
    if len(sizes):
        yield f"  pixels: width {_range(sizes[:, 0])}, height {_range(sizes[:, 1])}"
    remarks = Counter(remark for *_, remarks in examined for remark in remarks)
    yield from (f"  {count} {remark}" for remark, count in remarks.items())


def _range(numbers):
    return " / ".join(str(int(value)) for value in (np.min(numbers), np.median(numbers), np.max(numbers)))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.check",
        description="Read every image of a data set as training would, and name the bad ones.",
        epilog="Exit code 0: training and linear evaluation can use the data set; 1: they cannot, and the "
        "last lines say why; 2: wrong use. Nothing is written.",
    )
    parser.add_argument("folder", metavar="DIR", help="data set: train/ and val/ with one folder per class")
    parser.add_argument(
        "-j", "--workers", type=int, metavar="N", help="processes that read (default: one per core)"
    )
    args = parser.parse_args()
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 (read in this process) or more, not {args.workers}")

    report, fine = check(args.folder, args.workers)
    print("\n".join(report))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    run_program(main, "python -m moco.check")
