"""Draws sheets of pictures: what the encoder is shown, and which images lie near each other in its features.

    python -m moco.show pairs DIR -o pairs.png --aug-plus --seed 0
    python -m moco.show neighbours checkpoint_0199.pth.tar DIR -o near.png
    python -m moco.show neighbours untrained DIR -o near_untrained.png -a resnet18

It needs matplotlib (`pip install matplotlib`).
"""

import argparse

from moco.errors import UserError, run_program
from moco.pictures import check_picture, save_picture, shortened

MOST_ROWS, MOST_COLUMNS = 40, 10  # more would be too long to look at, or too small to recognise


def main():
    args = parse_args()
    _check(args)
    check_picture(args.out, args.force)
    from moco.run_settings import data_folder  # imports torch, which --help does not need

    draw = _pairs if args.sheet == "pairs" else _neighbours
    draw(args, data_folder(args))
    print(args.out)


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m moco.show", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    sheets = parser.add_subparsers(dest="sheet", required=True, metavar="SHEET")
    about = {
        "pairs": "images and the two views of each that pre-training gets from them, to the pixel",
        "neighbours": "validation images and the training images nearest to them under a checkpoint",
    }
    pairs, neighbours = (
        sheets.add_parser(name, help=text, description=f"Draws {text}.", allow_abbrev=False)
        for name, text in about.items()
    )
    neighbours.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="of pre-training or linear evaluation, a released model's name, or untrained",
    )
    for sheet in (pairs, neighbours):
        _add_shared(sheet)
    pairs.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation, not v1's")
    pairs.add_argument("--epoch", type=int, default=0, metavar="N", help="from 0 (default: %(default)s)")
    neighbours.add_argument(
        "--neighbours", type=int, default=5, metavar="N", help="of each image (default: %(default)s)"
    )
    neighbours.add_argument(
        "-a", "--arch", help="torchvision model (default: what the checkpoint says, or else resnet50)"
    )
    neighbours.add_argument(
        "--among", type=int, metavar="N",
        help="search only N training images, drawn by --seed (default: all; on a CPU that can take long)",
    )  # fmt: skip
    neighbours.add_argument(
        "-b", "--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)"
    )
    neighbours.add_argument(
        "-j", "--workers", type=int, metavar="N", help="loader processes (default: one per core)"
    )
    return parser.parse_args()


def _add_shared(sheet):
    add = sheet.add_argument
    add("folder", metavar="DIR", nargs="?", help="data set with train/ (and for neighbours val/)")
    add("--dataset-root", "--dataset_root", metavar="ROOT", help="folder that holds the data set --dataset")
    add(
        "--dataset", default="imagenet100", metavar="NAME",
        help="its name; trifeature is drawn when missing (default: %(default)s)",
    )  # fmt: skip
    add("-o", "--out", required=True, metavar="OUT.png", help="picture to write; .pdf and .svg work as well")
    add("--force", action="store_true", help="replace OUT.png if it exists")
    add(
        "--image-size", type=int, metavar="S",
        help="side of a view (default: 224, or the checkpoint's where it says)",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="chooses images and views (default: %(default)s)")
    add("--count", type=int, default=8, metavar="N", help="images (default: %(default)s)")
    add(
        "--resize", choices=("pil", "torch"), default="pil",
        help="as in training: pil on a CPU, torch on CUDA unless given (default: %(default)s)",
    )  # fmt: skip
    add(
        "--decoder", choices=("pillow", "simplejpeg"), help="of JPEG files (default: simplejpeg if installed)"
    )


def _check(args):
    limits = {
        "count": (1, MOST_ROWS),
        "epoch": (0, None),
        "neighbours": (1, MOST_COLUMNS),
        "among": (1, None),
    }
    limits |= {"batch_size": (1, None), "workers": (0, None), "image_size": (8, None), "seed": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        if value is not None and not (low <= value and (high is None or value <= high)):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} must be {span}, not {value}")


def _pairs(args, folder):
    from moco.data import image_folder
    from moco.draws import moco_v1, moco_v2
    from moco.show_pairs import pairs_of, pairs_sheet

    size = args.image_size or 224
    images = image_folder(folder, "train")
    recipe, name = (moco_v2(), "v2") if args.aug_plus else (moco_v1(), "v1")
    pairs = pairs_of(images, recipe, size, args.resize, args.seed, args.epoch, args.count, args.decoder)
    title = (
        f"{shortened(str(folder), 70)}: the first pairs of epoch {args.epoch} with seed {args.seed}\n"
        f"MoCo {name} augmentation, views of {size} x {size} pixels, resize {args.resize}"
    )
    save_picture(pairs_sheet(pairs, title), args.out)


def _neighbours(args, folder):
    from moco.data import image_folder
    from moco.encoders import check_image_size
    from moco.launch import launch
    from moco.show_neighbours import backbone_of

    splits = image_folder(folder, "train"), image_folder(folder, "val")
    model, arch, size, about = backbone_of(args.checkpoint, args.arch, args.seed)
    args.image_size = args.image_size or size or 224
    check_image_size(arch, args.image_size)
    launch(_draw_neighbours, (args, folder, *splits, model, about))


def _draw_neighbours(process, args, folder, train, val, model, about):
    from moco.data import Loading
    from moco.show_neighbours import agreement, neighbours_of, neighbours_sheet

    loading = Loading(args.image_size, args.resize, args.batch_size, args.workers, args.decoder)
    found = neighbours_of(
        process, model, train, val, loading, args.seed, args.count, args.neighbours, args.among
    )
    searched = f"all {len(train)}" if args.among is None else f"{args.among} of {len(train)}"
    title = (
        f"Nearest of {searched} training images by the cosine of the features of\n{shortened(about, 100)}\n"
        f"{shortened(str(folder), 50)}, {args.image_size} x {args.image_size} pixels; {agreement(found)}"
    )
    save_picture(neighbours_sheet(found, title), args.out)
    print(agreement(found))


if __name__ == "__main__":
    run_program(main)
