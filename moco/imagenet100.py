"""ImageNet-100 from ImageNet, or class folders from parquet files of the Hugging Face hub.

    python -m moco.imagenet100 PATH/TO/IMAGENET PATH/TO/DATA/imagenet100
    python -m moco.imagenet100 --parquet PATH/TO/*.parquet PATH/TO/DATA/imagenet100
    python main_moco.py --dataset_root PATH/TO/DATA --dataset imagenet100 ...

PATH/TO/IMAGENET holds train/ and val/ with one folder per class (as for ImageFolder), or is in Kaggle's
layout: ILSVRC/Data/CLS-LOC/train and val, with the classes of the images in val/ in LOC_val_solution.csv.
The 100 classes are those of imagenet100.txt; their images are linked or copied.

Parquet files are those of the hub, such as data/ of clane9/imagenet-100, downloaded by hand. Reading them
needs pyarrow (`pip install pyarrow`).
"""

import contextlib
import csv
import os
import re
import shutil
from pathlib import Path

from moco.errors import Parser, UserError, interrupt_on_signals, printable, run_program, shell_word
from moco.files import atomic_folder
from moco.progress import Progress

IMAGES = {"train": 126_689, "val": 5_000}  # in the 100 classes together
LABELS = "LOC_val_solution.csv"
SUFFIXES = ".jpeg", ".jpg", ".png"
REDUCED = 300  # pixels of a short side: images of ImageNet are mostly 500 x 375, and below this made smaller


def read_classes():
    """The 100 class ids, sorted as ImageFolder sorts them; the list that the authors of IFM link to."""
    return sorted(Path(__file__).with_name("imagenet100.txt").read_text().split())


def make(imagenet, out, copy=False):
    """Make the folder `out` with train/ and val/ and a folder per class in each.

    imagenet: the folder of ImageNet, in one of the layouts above; copy: copy the images instead of linking
    to them. Raises UserError, and nothing is at `out` then.
    """
    imagenet, out = Path(imagenet).resolve(), Path(out).resolve()
    with _sentences(out):
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


@contextlib.contextmanager
def _sentences(out):
    """Raise UserError for what goes wrong with files while `out` is made."""
    try:
        yield
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
    if imagenet.suffix == ".parquet" or any(any(imagenet.glob(f"{below}*.parquet")) for below in ("", "*/")):
        raise UserError(f"{imagenet} has parquet files: name them after --parquet, then the folder to make")
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


def unpack(files, out, label=None):
    """Make the folder `out` from parquet files: moco.data.parquet.unpack, with all errors as UserError."""
    from moco.data import parquet

    out = Path(out).resolve()
    if out.suffix == ".parquet":
        raise UserError(f"the folder to make comes last, and {out} looks like a parquet file: add a folder")
    with _sentences(out):
        return parquet.unpack(files, out, label)


def _remarks(unpacked):
    """What to know of the images of an Unpacked before numbers from them are compared, as lines."""
    images, side = unpacked.images, unpacked.side
    if unpacked.left_out:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in unpacked.left_out.items())
        yield f"left out: {counts}"
    if side:
        yield f"short side of the images: {side} pixels (median of {unpacked.sampled:,})"
    if not _are_imagenets(unpacked.names or []):
        return
    if side and side < REDUCED:
        yield (
            f"note: images of ImageNet, made smaller to a short side of {side} pixels: numbers from them "
            "cannot be compared with those from images of full size"
        )
    if len(unpacked.names) == 100 and images != IMAGES:
        yield (
            f"note: ImageNet-100 has {IMAGES['train']:,} training and {IMAGES['val']:,} validation images: "
            "numbers from these cannot be compared with published ones"
        )


def _are_imagenets(names):
    """Whether all class names are of ImageNet: ids, or the words of WordNet, of which torchvision has one."""
    from torchvision.models import ResNet18_Weights

    words = set(ResNet18_Weights.DEFAULT.meta["categories"])
    return bool(names) and all(re.fullmatch(r"n\d{8}", name) or name.split(",")[0] in words for name in names)


def main():
    parser = Parser(
        prog="python -m moco.imagenet100",
        usage="python -m moco.imagenet100 [--copy] IMAGENET OUT\n"
        "       python -m moco.imagenet100 --parquet FILES... OUT [--label NAME]",
        description="Make ImageNet-100, the 100 classes of the published experiments, from ImageNet: "
        "126,689 training and 5,000 validation images. Or, with --parquet, make class folders from the "
        "parquet files of any data set of the Hugging Face hub.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
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
    parser.add_argument(
        "--parquet",
        action="store_true",
        help="what is named before OUT are parquet files, such as train-00000-of-00017.parquet",
    )
    parser.add_argument(
        "--label", metavar="NAME", help="the column with the classes (default: label, or the only one)"
    )
    args = parser.parse_intermixed_args()
    if args.parquet and args.copy:
        raise UserError("images in parquet files are always copied: leave out --copy")
    if not args.parquet and (args.label or len(args.sources) > 1):
        what = "--label is" if args.label else "several files are"
        raise UserError(f"{what} for parquet files: give --parquet too, or leave it out")
    interrupt_on_signals()
    remarks, size = [], ""
    if args.parquet:
        unpacked = unpack(args.sources, args.out, args.label)
        images, classes, remarks = unpacked.images, len(unpacked.folders), _remarks(unpacked)
        size = f" --image-size {unpacked.side}" if unpacked.side and unpacked.side < 224 else ""
    else:
        make(args.sources[0], args.out, args.copy)
        images, classes = IMAGES, 100
    out = Path(args.out).resolve()
    train, val = (f"{images.get(split, 0):,}" for split in IMAGES)
    print(f"{printable(out)}: {train} training and {val} validation images of {classes} classes")
    for remark in remarks:
        print(remark)
    words = f"--dataset_root {shell_word(out.parent)} --dataset {shell_word(out.name)}"
    print(f"train on them with: python main_moco.py {words}{size} ...")


if __name__ == "__main__":
    run_program(main, "python -m moco.imagenet100")
