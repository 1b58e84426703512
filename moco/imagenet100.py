"""ImageNet-100 from ImageNet: the 100 classes of imagenet100.txt in a folder of their own, linked or copied.

ImageNet may be a folder with train/ and val/, or the tar files as image-net.org gives them out. The work is
done in OUT.part, which the same command continues after an interruption; at the end it is renamed to OUT.

    python -m moco.imagenet100 PATH/TO/IMAGENET PATH/TO/DATA/imagenet100
    python main_moco.py --dataset_root PATH/TO/DATA --dataset imagenet100 ...
"""

import argparse
import os
import shutil
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

from moco.errors import UserError, run_program
from moco.files import fsync_path, sha256
from moco.imagenet_source import find_source, find_val_labels, images, is_image, needs_labels, read_val_labels
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
AGAIN = "run the same command again, and it continues"


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
        for split, source in sources.items():
            fill_split(split, source, part / split, classes, labels[split], copy, expected[split])
        counts = {split: sum(count_images(part / split, classes).values()) for split in sources}
        put_in_place(part, out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; when that is put right, {AGAIN}"
        ) from error
    return counts


def check_target(out, part, sources, classes, force):
    """Refuse, before anything is written, to replace what this program did not make or has to read."""
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which cannot be replaced: name a new folder in it")
    for source in sources:
        if source == out or out in source.parents or source in out.parents:
            raise UserError(f"{out} and {source}, which is read, lie in each other: name a folder outside")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise UserError(f"{out} exists already: name another folder, or replace it with --force")
        if not holds_only(out, classes):
            raise UserError(f"{out} holds more than ImageNet-100's train/ and val/: remove it yourself")
    if os.path.lexists(part) and not holds_only(part, classes):
        raise UserError(f"{part} is in the way and is not the beginning of {out.name}: move it elsewhere")


def holds_only(folder, classes):
    """Whether `folder` holds nothing but train/ and val/ with folders of `classes` in them."""
    splits = list(folder.iterdir()) if folder.is_dir() else [folder]
    return all(path.name in ("train", "val") and path.is_dir() for path in splits) and all(
        name in classes for path in splits for name in os.listdir(path)
    )


def fill_split(split, source, folder, classes, labels, copy, expected):
    """Fill `folder` with one split from `source`, whichever form that has, and check the counts."""
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
    check_counts(split, source, count_images(folder, classes), classes, *expected)


def count_images(folder, classes):
    """{wnid: number of images}, through links; a class that has no folder is not in it."""
    return {
        wnid: sum(map(is_image, os.listdir(folder / wnid))) for wnid in classes if (folder / wnid).is_dir()
    }


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


def link_class_folders(source, folder, classes):
    """Make `folder`/wnid a link to `source`/wnid for every class."""
    folder.mkdir(parents=True, exist_ok=True)
    for wnid in classes:
        target = folder / wnid
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        target.symlink_to(source / wnid, target_is_directory=True)


def fill(folder, classes, images, copy, progress):
    """Put `images` into `folder`/wnid/ as links or, with `copy` and out of a tar file, as copies.

    What lies there already with the right size stays, what does not belong there goes.
    """
    for wnid in classes:
        if (folder / wnid).is_symlink():  # of a run without --copy: to write through it would change ImageNet
            (folder / wnid).unlink()
        (folder / wnid).mkdir(parents=True, exist_ok=True)
    wanted = defaultdict(set)
    for image in images:
        wanted[image.wnid].add(image.name)
        target = folder / image.wnid / image.name
        link_to = None if copy or image.path is None else str(image.path)
        if is_there(target, image.size, link_to):
            progress.skip(1)
            continue
        target.unlink(missing_ok=True)
        if link_to:
            target.symlink_to(link_to)
        else:
            with image.open() as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        progress.update()
    for wnid in classes:
        for name in set(os.listdir(folder / wnid)) - wanted[wnid]:
            (folder / wnid / name).unlink()


def is_there(target, size, link_to):
    """Whether `target` is the wanted link, or (`link_to` None) a file of `size` bytes."""
    if link_to or target.is_symlink():
        return target.is_symlink() and os.readlink(target) == link_to
    return target.is_file() and target.stat().st_size == size


def put_in_place(part, out):
    """Rename `part` to `out`. An earlier `out` is deleted only when the new one stands in its place."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent)) / out.name
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        fsync_path(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    finally:
        shutil.rmtree(old.parent)


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
