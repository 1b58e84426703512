"""Reads every image of a data set before a run does: `python -m moco.check DIR` names those that are bad."""

import argparse
import contextlib
import copy
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco import trifeature
from moco.data.decode import decoder_name, read_pixels, reason
from moco.data.folders import image_folder, paths_of, use_numbers_of_train
from moco.data.ring import Workers
from moco.errors import UserError, printable, run_program
from moco.progress import Progress
from moco.run.resources import available_cores

PART = 16  # images that a worker reads at a time
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
REMARKS = {
    "orientation": "with an orientation in EXIF, which training ignores: pixels as stored",
    "CMYK": "in CMYK, converted to RGB without their color profile",
    "16 bits": "with 16 bits a color, of which the high 8 are used",
    "alpha": "with transparency, which is dropped",
    "huge": "so large that Pillow warns of a decompression bomb",
}


def check(folder, workers=None):
    """Read all images of a data set as training would. Returns a dict of plain values, as --json prints it.

    folder: holds train/ and perhaps val/; workers: processes (default: one per core; 0: this process). The
    entry `faults` says why training or linear evaluation would refuse the set. Raises UserError when there is
    no train/.
    """
    folder = Path(folder)
    splits, faults, held_out = _find(folder)
    paths = [path for images in splits.values() for path in paths_of(images)]
    answers = _read_all(paths, available_cores() if workers is None else workers, printable(folder))
    report = {"folder": str(folder), "decoder": decoder_name(), "images": len(paths), "splits": {}}
    sizes = iter(size for _, size, _ in answers)
    for split, images in splits.items():
        good = np.array([size for _, size in zip(images.samples, sizes, strict=False) if size], np.int64)
        ignored = _ignored(folder / split)
        report["splits"][split] = {
            "images": len(images),
            "classes": len(images.classes),
            "images_of_a_class": _range(list(Counter(images.targets).values())),
            "width": _range(good[:, 0]) if len(good) else [],
            "height": _range(good[:, 1]) if len(good) else [],
            "ignored": len(ignored),
            "ignored_example": min(ignored, default=None),
        }
    report["bad"] = [
        {"path": path, "reason": why}
        for path, (why, _, _) in zip(paths, answers, strict=True)
        if why is not None
    ]
    odd = Counter(remark for _, _, remarks in answers for remark in remarks)
    report["odd"] = {remark: odd[remark] for remark in REMARKS if odd[remark]}
    return report | {"faults": faults, "held_out": held_out}


def _find(folder):
    """({split: ImageFolder}, list of why training would refuse them, whether it is a Trifeature set)."""
    splits, faults = {}, []
    for split in ("train", "val"):
        if split == "train" or (folder / split).is_dir():  # without train/ it raises, as training does
            try:
                splits[split] = image_folder(folder, split)
            except UserError as error:
                if not (folder / split).is_dir():
                    raise
                faults.append(str(error))
                with contextlib.suppress(FileNotFoundError):  # no class folder at all
                    splits[split] = ImageFolder(str(folder / split), allow_empty=True)
    held_out = (folder / trifeature.SETTINGS).exists() and all(
        trifeature.is_combination(name) for images in splits.values() for name in images.classes
    )
    if not faults and len(splits) == 2 and not held_out:
        try:
            use_numbers_of_train(splits["train"], copy.copy(splits["val"]), "linear evaluation refuses it")
        except UserError as error:
            faults.append(str(error))
    return splits, faults, held_out


def _read_all(paths, workers, label):
    """What `_examine` returns for each path, by `workers` processes, with progress."""
    parts = [range(first, min(first + PART, len(paths))) for first in range(0, len(paths), PART)]
    crew, answers = Workers(_Examined(paths), parts, min(workers, len(parts))), []
    try:
        with Progress(label, len(paths), "images") as progress:
            for of_part in crew:
                answers += of_part
                progress.update(len(of_part))
    finally:
        crew.close()
    return answers


class _Examined:
    """Item `part` (a range of numbers): what `_examine` returns for each of these paths."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, part):
        return [_examine(self.paths[index]) for index in part]


def _examine(path):
    """(why an image cannot be read or None, (width, height) or None, names of remarks) of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's name no file; what matters of them is remarked
        try:
            height, width, _ = read_pixels(path).shape
            return None, (width, height), list(_remarks(path, width * height))
        except (UserError, OSError) as error:
            return reason(error.__cause__ or error), None, []


def text(report):
    """The dict of `check` as lines for a person; names of files are escaped where they cannot be printed."""
    return "\n".join(_lines(report))


def _lines(report):
    for split, values in report["splits"].items():
        name = printable(Path(report["folder"]) / split)
        yield f"{name}: {_count(values['images'], 'image')} in {_count(values['classes'], 'class')}"
        if values["width"]:
            width, height = _slashes(values["width"]), _slashes(values["height"])
            yield f"  pixels (smallest, median, largest): width {width}, height {height}"
        if values["classes"] > 1:
            yield f"  images of a class (smallest, median, largest): {_slashes(values['images_of_a_class'])}"
        if values["ignored"]:
            example = printable(values["ignored_example"])
            yield f"  {_count(values['ignored'], 'file')} that training does not use, such as {example}:"
            yield "  outside the class folders, or no image by the name"
    if report["odd"]:
        yield "odd, but read:"
        yield from (f"  {count} {REMARKS[remark]}" for remark, count in report["odd"].items())
    if report["held_out"]:
        yield "a Trifeature set: by design, val/ holds the combinations that train/ does not have"
    for bad in report["bad"]:
        yield f"bad: {printable(bad['path'])}"
        yield f"     {printable(bad['reason'])}"
    if report["bad"]:
        yield f"{len(report['bad'])} of {_count(report['images'], 'image')} cannot be read: mend or remove"
        yield "them, or train with --on-bad-image skip (images of train/ only)"
    elif report["images"]:
        yield f"all {_count(report['images'], 'image')} can be read, by {report['decoder']}"
    yield from (f"fault: {printable(fault)}" for fault in report["faults"])


def _ignored(root):
    """Paths of the files below `root` that ImageFolder leaves out."""
    return [
        os.path.join(place, name)
        for place, _, names in os.walk(root, followlinks=True)
        for name in names
        if place == str(root) or not name.lower().endswith(IMG_EXTENSIONS)
    ]


def _remarks(path, pixels):
    with Image.open(path) as image:
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


def _range(numbers):
    """Smallest, median and largest, or [] of none."""
    return [int(np.min(numbers)), int(np.median(numbers)), int(np.max(numbers))] if len(numbers) else []


def _count(number, noun):
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _slashes(numbers):
    return " / ".join(map(str, numbers))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.check",
        description=__doc__.splitlines()[0],
        epilog="Exit code 0: every image can be read, and training and linear evaluation can start; 1: they "
        "cannot (each bad image is named, and what else is wrong); 2: wrong use. Nothing is written.",
    )
    parser.add_argument("folder", metavar="DIR", help="data set: train/ and val/ with one folder per class")
    parser.add_argument(
        "-j", "--workers", type=int, metavar="N", help="processes that read (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 (read in this process) or more, not {args.workers}")

    report = check(args.folder, args.workers)
    print(json.dumps(report, indent=1) if args.json else text(report))
    sys.exit(1 if report["bad"] or report["faults"] else 0)


if __name__ == "__main__":
    run_program(main, "python -m moco.check")
