"""ImageNet-100 from ImageNet: the 100 classes of imagenet100.txt in a folder of their own, linked or copied.

    python -m moco.imagenet100 PATH/TO/IMAGENET PATH/TO/DATA/imagenet100
    python main_moco.py --dataset_root PATH/TO/DATA --dataset imagenet100 ...

PATH/TO/IMAGENET holds train/ and val/ with one folder per class (as for ImageFolder), or is in Kaggle's
layout: ILSVRC/Data/CLS-LOC/train and val, with the classes of the images in val/ in LOC_val_solution.csv.
"""

import csv
import os
import shutil
import signal
from pathlib import Path

from moco.errors import Parser, UserError, printable, run_program, shell_word
from moco.files import atomic_folder
from moco.progress import Progress

IMAGES = {"train": 126_689, "val": 5_000}  # in the 100 classes together
LABELS = "LOC_val_solution.csv"
SUFFIXES = ".jpeg", ".jpg", ".png"


def read_classes():
    """The 100 class ids, sorted as ImageFolder sorts them; the list that the authors of IFM link to."""
    return sorted(Path(__file__).with_name("imagenet100.txt").read_text().split())


def make(imagenet, out, copy=False):
    """Make the folder `out` with train/ and val/ and a folder per class in each.

    imagenet: the folder of ImageNet, in one of the layouts above; copy: copy the images instead of linking
    to them. Raises UserError, and nothing is at `out` then.
    """
    imagenet, out = Path(imagenet).resolve(), Path(out).resolve()
    try:
        folder, classes = _find(imagenet), read_classes()
        files = {split: {name: _images_in(folder / split / name) for name in classes} for split in IMAGES}
        if not any(files["val"].values()):
            files["val"] = _labeled(folder / "val", classes, _read_labels(imagenet))
        for split, of_class in files.items():
            _check_complete(folder / split, of_class, IMAGES[split])
        with atomic_folder(out) as temporary, Progress("images", sum(IMAGES.values())) as progress:
            for split, of_class in files.items():
                for name, paths in of_class.items():
                    _fill(temporary / split / name, paths, copy)
                    progress.update(len(paths))
    except FileExistsError as error:
        raise UserError(
            f"{error.filename or out} exists already: name another folder, or remove it"
        ) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; choose another place"
        ) from error


def _find(imagenet):
    """The folder with train/ and val/ in `imagenet`."""
    for folder in (imagenet, imagenet / "ILSVRC" / "Data" / "CLS-LOC"):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder
    if imagenet.suffix == ".tar" or any(imagenet.glob("ILSVRC2012_img_*.tar")):
        raise UserError(
            f"{imagenet} has the original tar files: unpack them with torchvision.datasets.ImageNet(ROOT, "
            'split="train") and split="val", where ROOT is the folder with the two tar files and '
            "ILSVRC2012_devkit_t12.tar.gz, and then name ROOT"
        )
    raise UserError(f"{imagenet} has no folders train/ and val/: name the folder of ImageNet")


def _images_in(folder):
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file())


def _read_labels(imagenet):
    """{name of a validation image without suffix: class id} from Kaggle's LOC_val_solution.csv."""
    path = imagenet / LABELS
    if not path.is_file():
        raise UserError(f"val/ has no folders of ImageNet classes, and there is no {path}: put it there")
    with open(path, newline="") as file:  # ImageId,PredictionString: the class id, then boxes
        rows = [row for row in csv.reader(file) if len(row) == 2 and row[1].strip()]
    return {row[0]: row[1].split()[0] for row in rows}


def _labeled(folder, classes, labels):
    """{class id: paths} of the images in `folder`."""
    files = {name: [] for name in classes}
    for path in _images_in(folder):
        if path.stem not in labels:
            raise UserError(f"{path} has no class in {LABELS}: download that file again")
        if labels[path.stem] in files:
            files[labels[path.stem]].append(path)
    return files


def _check_complete(folder, files, expected):
    """Raise UserError that names missing classes unless {class id: paths} has `expected` images."""
    count, missing = sum(map(len, files.values())), [name for name in files if not files[name]]
    if count != expected or missing:
        of = f", and none of {len(missing)} classes such as {missing[0]}" if missing else ""
        raise UserError(
            f"{folder} has {count:,} of the {expected:,} images that are needed{of}: unpack ImageNet again"
        )


def _fill(folder, paths, copy):
    """Make `folder` with a link to each of the `paths`, or with a copy."""
    folder.mkdir(parents=True)
    for path in paths:
        if copy:
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)


def main():
    parser = Parser(
        prog="python -m moco.imagenet100",
        description="Make ImageNet-100, the 100 classes of the published experiments, from ImageNet: "
        "126,689 training and 5,000 validation images.",
    )
    parser.add_argument(
        "imagenet",
        metavar="IMAGENET",
        help="the folder with train/ and val/ and one folder per class in each, or Kaggle's folder with "
        f"ILSVRC/Data/CLS-LOC/ and {LABELS}; torchvision.datasets.ImageNet unpacks the original tar files",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make; it appears when every image is there")
    parser.add_argument(
        "--copy",
        action="store_true",
        help="copy the images (about 15 GB) instead of linking to them, for a faster disk",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind then, too
    make(args.imagenet, args.out, args.copy)
    out = Path(args.out).resolve()
    counts = f"{IMAGES['train']:,} training and {IMAGES['val']:,} validation images of 100 classes"
    print(f"{printable(out)}: {counts}")
    words = f"--dataset_root {shell_word(out.parent)} --dataset {shell_word(out.name)}"
    print(f"train on them with: python main_moco.py {words} ...")


if __name__ == "__main__":
    run_program(main, "python -m moco.imagenet100")
