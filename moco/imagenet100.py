"""ImageNet-100 from ImageNet: the 100 classes of imagenet100.txt in a folder of their own, linked or copied.

ImageNet may be a folder with train/ and val/, or the tar files as image-net.org gives them out. The work is
done in OUT.part, which the same command continues after an interruption; at the end it is renamed to OUT.

    python -m moco.imagenet100 PATH/TO/IMAGENET PATH/TO/DATA/imagenet100
    python main_moco.py --dataset_root PATH/TO/DATA --dataset imagenet100 ...
"""

import argparse
import tarfile
from pathlib import Path

from moco.errors import UserError, run_program
from moco.files import sha256
from moco.imagenet_source import (
    find_source,
    find_val_labels,
    image_files,
    images,
    needs_labels,
    read_val_labels,
)
from moco.imagenet_target import AGAIN, alone, check_target, fill, link_class_folders, put_in_place
from moco.progress import Progress

CLASS_LIST = Path(__file__).with_name("imagenet100.txt")
CLASS_LIST_SHA256 = "79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397"
EXPECTED = {  # images in the 100 classes together, and the fewest and the most in one class
    "train": (126_689, (732, 1300)),  # the range: Russakovsky et al. 2015 (arXiv:1409.0575), table 2
    "val": (5_000, (50, 50)),
}
MD5 = {  # of the published tar files
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
}


def read_classes(path=CLASS_LIST, digest=CLASS_LIST_SHA256):
    """The class ids in `path`, one a line, sorted as ImageFolder sorts them.

    The list decides what ImageNet-100 is, so a file with another SHA-256 than `digest` is refused.
    """
    if sha256(path) != digest:
        raise UserError(f"{path} is not the published list of classes: restore the program's own file")
    return sorted(Path(path).read_text().split())


def make(places, out, copy=False, force=False, val_labels=None, classes=None, expected=EXPECTED):
    """Build the folder `out` with train/ and val/ and a folder per class below each; return {split: images}.

    `places` are folders that hold train/ and val/ or the tar files, or are the tar files themselves. Folders
    of images are linked, or copied with `copy`; images in tar files are extracted. `classes` are the class
    ids (None: the 100), `expected` is {split: (images in all, (fewest, most in one class))}. Raises UserError
    when `out` exists (without `force`) and for all that is missing or off; `out` is then as it was.
    """
    places, out = [Path(place) for place in places], Path(out).resolve()
    part = out.parent / f"{out.name}.part"
    try:
        classes = classes or read_classes()
        sources = {split: find_source(split, places) for split in ("val", "train")}
        check_target(out, part, sources.values(), classes, force)
        labels = {"val": None, "train": None}
        if needs_labels("val", sources["val"]):
            labels["val"] = read_val_labels(val_labels or find_val_labels(places))
        for split, source in sources.items():
            if source.is_dir() and labels[split] is None:
                check_counts(split, source, count_images(source, classes), classes, *expected[split])
        with alone(part):
            check_target(out, part, sources.values(), classes, force)  # perhaps another process made it
            counts = {
                split: fill_split(split, source, part / split, classes, labels[split], copy, expected[split])
                for split, source in sources.items()
            }
            put_in_place(part, out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; when that is put right, {AGAIN}"
        ) from error
    return counts


def fill_split(split, source, folder, classes, labels, copy, expected):
    """Fill `folder` with one split from `source`, whichever form that has, and check the counts. Returns
    the number of images.
    """
    if source.is_dir() and labels is None and not copy:
        link_class_folders(source, folder, classes)
    else:
        try:
            with Progress(split, expected[0], "images") as progress:
                fill(folder, classes, images(source, classes, labels), copy, progress)
        except tarfile.TarError as error:
            raise UserError(
                f"{source} is damaged or cut off ({error}): the MD5 of the published file is {MD5[split]}; "
                f"fetch it again, {AGAIN}"
            ) from error
    counts = count_images(folder, classes)
    check_counts(split, source, counts, classes, *expected)
    return sum(counts.values())


def count_images(folder, classes):
    """{wnid: number of images}, through links; a class that has no folder is not in it."""
    return {wnid: len(image_files(folder / wnid)) for wnid in classes if (folder / wnid).is_dir()}


def check_counts(split, source, counts, classes, total, per_class):
    """Raise a UserError that names every class that is missing or whose number of images is off."""
    fewest, most = per_class
    missing = [wnid for wnid in classes if not counts.get(wnid)]
    present = [wnid for wnid in classes if counts.get(wnid)]
    off = [wnid for wnid in present if not fewest <= counts[wnid] <= most]
    found = sum(counts.values())
    if not missing and not off and found == total:
        return
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(classes)} classes are missing: {', '.join(missing)}")
    usual = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    faults += [f"{wnid} has {counts[wnid]:,} instead of {usual}" for wnid in off]
    if not faults:  # the number of each class is not published, only their sum: say where to look
        short = [f"{wnid} {counts[wnid]:,}" for wnid in present if counts[wnid] < most]
        faults.append(f"the classes below {most:,} are {', '.join(short) or 'none'}")
    raise UserError(
        f"{source} has {found:,} of the {total:,} {split} images that are needed; {'; '.join(faults)}"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="python -m moco.imagenet100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make ImageNet-100, the 100 classes of the published experiments, from ImageNet:\n"
        "126,689 training and 5,000 validation images. A run that was interrupted is\n"
        "continued by the same command.",
    )
    parser.add_argument(
        "imagenet",
        nargs="+",
        metavar="IMAGENET",
        help="the folder with train/ and val/, or with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; "
        "or the two tar files, when they lie in different folders",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make; it appears when every image is there")
    parser.add_argument(
        "--copy",
        action="store_true",
        help="copy the images (about 15 GB) instead of linking to them, for a faster disk; "
        "out of tar files they are always copied",
    )
    parser.add_argument(
        "--val-labels",
        metavar="FILE",
        help="the classes of the validation images, needed when these are not in class folders: "
        "imagenet_2012_validation_synset_labels.txt, LOC_val_solution.csv, valprep.sh or "
        "ILSVRC2012_devkit_t12.tar.gz; found by itself when it lies beside them",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT when it is an ImageNet-100 already")
    return parser.parse_args()


def main():
    args = parse_arguments()
    counts = make(args.imagenet, args.out, args.copy, args.force, args.val_labels)
    out = Path(args.out).resolve()
    print(f"{out}: {counts['train']:,} training and {counts['val']:,} validation images of 100 classes")
    print(f"train on them with: python main_moco.py --dataset_root {out.parent} --dataset {out.name} ...")


if __name__ == "__main__":
    run_program(main)
