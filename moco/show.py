"""Draws sheets of pictures: the views that the encoder gets, and which images are near each other for it.

    python -m moco.show pairs DIR -o pairs.png --aug-plus --seed 0
    python -m moco.show neighbors checkpoint_0199.pth.tar DIR -o near.png
    python -m moco.show neighbors untrained DIR -o near_untrained.png -a resnet18

It needs matplotlib (`pip install matplotlib`).
"""

import copy
import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from moco.data.augment import moco_v1, moco_v2
from moco.data.decode import read_pixels
from moco.data.folders import data_folder, image_folder, paths_of, pretraining_images
from moco.data.loader import TrainLoader
from moco.data.pil import center_resize
from moco.encoders import backbone, base_encoder, check_image_size
from moco.errors import Parser, UserError, printable, run_program
from moco.evaluate.features import backbone_of, embed
from moco.evaluate.knn import neighbors
from moco.options import add_gray_range
from moco.plot import BLACK, BLUE, RED, WIDTH, check_picture, literal, own_style, save_picture
from moco.run.resources import available_cores
from moco.seeds import seeded
from moco.trifeature import FACTORS, is_combination

UNTRAINED = "untrained"
BOUNDS = {
    "count": (1, 40),
    "neighbors": (1, 10),
    "image_size": (8, math.inf),
    "seed": (0, 2**63 - 1),
    "epoch": (0, math.inf),
    "workers": (0, math.inf),
}


def main():
    args = parse_args()
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    check_picture(args.out, args.force)
    folder = data_folder(args.folder, args.dataset_root, args.dataset)
    figure = draw_pairs(args, folder) if args.sheet == "pairs" else draw_neighbors(args, folder)
    save_picture(figure, args.out)
    print(printable(args.out))


def parse_args():
    parser = Parser(prog="python -m moco.show", description=__doc__.splitlines()[0], allow_abbrev=False)
    sheets = parser.add_subparsers(dest="sheet", required=True, metavar="SHEET")
    text = "images and the two views of each that pre-training gets from them, to the pixel"
    pairs = sheets.add_parser("pairs", help=text, description=f"Draws {text}.", allow_abbrev=False)
    text = "validation images and the training images nearest to them under a checkpoint"
    near = sheets.add_parser("neighbors", help=text, description=f"Draws {text}.", allow_abbrev=False)
    text = "of pre-training or linear evaluation, a released model's name, or untrained"
    near.add_argument("checkpoint", metavar="CKPT", help=text)
    for sheet in (pairs, near):
        add = sheet.add_argument
        text = "images as for pre-training" if sheet is pairs else "data set with train/ and val/"
        add("folder", metavar="DIR", nargs="?", help=text)
        add("--dataset-root", "--dataset_root", metavar="ROOT", help="folder that holds --dataset")
        text = "a folder in ROOT; trifeature is drawn when missing (default: %(default)s)"
        add("--dataset", default="imagenet100", metavar="NAME", help=text)
        add("-o", "--out", required=True, metavar="OUT.png", help="picture to write, also .pdf or .svg")
        add("--force", action="store_true", help="replace OUT.png if it exists")
        add("--image-size", type=int, metavar="S", help="side of a view (default: the checkpoint's, or 224)")
        add("--seed", type=int, default=0, metavar="N", help="chooses the images (default: %(default)s)")
        add("--count", type=int, default=8, metavar="N", help="images (default: %(default)s)")
        add("--resize", choices=("pil", "torch"), default="pil", help="as in training (default: %(default)s)")
        add_gray_range(add)
    pairs.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation, not v1's")
    pairs.add_argument("--epoch", type=int, default=0, metavar="N", help="from 0 (default: %(default)s)")
    add = near.add_argument
    add("--neighbors", type=int, default=5, metavar="N", help="of each image (default: %(default)s)")
    add("-a", "--arch", help="as in training (default: what the checkpoint says, or else resnet50)")
    add("-j", "--workers", type=int, metavar="W", help="loader processes (default: one per core)")
    return parser.parse_args()


# A sheet: a grid of pictures with words.


@dataclass
class Tile:
    """A picture, uint8 (H, W, 3); a title above it, in `color`; (text, color) of the lines below; boxes to
    draw in it: (top, left, height, width, look), look: matplotlib's names and values.
    """

    picture: np.ndarray
    title: str
    lines: list
    color: str = BLACK
    boxes: list = field(default_factory=list)


def sheet(title, tiles, columns):
    """A matplotlib Figure of a title, which may have several lines, and Tiles in rows of `columns`."""
    line, cell, head = 0.15, WIDTH / columns, 0.25 + 0.2 * len(title.splitlines())  # inches
    side, most = 0.92 * cell, max(len(tile.lines) for tile in tiles)
    height = 1.04 * side + line * (1.5 + most)
    total = head + math.ceil(len(tiles) / columns) * height
    with own_style() as matplotlib:
        from matplotlib.patches import Rectangle

        figure = matplotlib.figure.Figure((WIDTH, total))
        words = "\n".join(map(literal, title.splitlines()))
        figure.text(0.1 / WIDTH, 1 - 0.08 / total, words, va="top", linespacing=1.4)
        for number, tile in enumerate(tiles):
            row, column = divmod(number, columns)
            left, bottom = (column + 0.04) * cell, total - head - row * height - side
            axis = figure.add_axes((left / WIDTH, bottom / total, side / WIDTH, side / total))
            axis.imshow(tile.picture, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(tile.title, fontsize=8, pad=3, color=tile.color)
            for y, x, tall, wide, look in tile.boxes:
                look = {"facecolor": "none", "linewidth": 2, "clip_on": False} | look
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), wide, tall, **look))
            for down, (text, color) in enumerate(tile.lines):
                text = literal(text, most=int(side / 0.067))  # letters of 8 points that fit
                y = -0.04 - down * line / side
                axis.text(0, y, text, transform=axis.transAxes, va="top", fontsize=8, color=color)
    return figure


def class_name(images, index):
    """Of an ImageFolder's image; without labels the name of its file."""
    if not images.classes:
        return os.path.basename(paths_of(images)[index])
    return images.classes[images.targets[index]]


def _channels_last(pixels):
    return pixels.permute(1, 2, 0).numpy()


def _check_count(flag, count, images):
    if count > len(images):
        raise UserError(f"{flag} {count} is more than the {len(images)} images to choose from")


# Pairs: the views that pre-training gets.

LOOKS = {  # of the boxes: dashes, as one box may lie on the other
    "query": {"edgecolor": BLUE},
    "key": {"edgecolor": RED, "linestyle": "--"},
}


def draw_pairs(args, folder):
    """The Figure of the first images of an epoch, in training's order, each with its query and its key.

    The views are what an encoder gets before normalization.
    """
    recipe, name = (moco_v2(), "v2") if args.aug_plus else (moco_v1(), "v1")
    size, images = args.image_size or 224, pretraining_images(folder)
    _check_count("--count", args.count, images)
    reading = {"resize": args.resize, "gray_range": args.gray_range}
    loader = TrainLoader(images, recipe, size=size, batch_size=args.count, seed=args.seed, **reading)
    batch, tiles = next(loader.epoch(args.epoch)), []
    for position, index in enumerate(batch.indices.tolist()):
        image = read_pixels(paths_of(images)[index], args.gray_range)
        records = batch.records[:, position]
        boxes = [(*record.item()[:4], look) for record, look in zip(records, LOOKS.values(), strict=True)]
        tiles.append(Tile(image, f"image {index}", [(class_name(images, index), BLACK)], boxes=boxes))
        for (label, look), record, pixels in zip(LOOKS.items(), records, batch.pixels, strict=True):
            lines = [(line, BLACK) for line in what_was_done(record, image.shape)]
            tiles.append(Tile(_channels_last(pixels[position]), label, lines, color=look["edgecolor"]))
    title = (
        f"{printable(folder)}: the first pairs of epoch {args.epoch} with seed {args.seed}, and where they "
        "are cut out\n"
        f"MoCo {name} augmentation, views of {size} x {size} pixels, resize {args.resize}; "
        "crop: of the image's area; blur: sigma in pixels"
    )
    return sheet(title, tiles, columns=6)


def what_was_done(record, shape):
    """Two short lines on a record of VIEW for an image of `shape` (H, W, ...)."""
    share = int(record["height"]) * int(record["width"]) / (shape[0] * shape[1])
    first = [f"crop {share:.0%}"] + ["flipped"] * bool(record["flip"])
    then = ["jitter"] * bool(record["jitter"]) + ["gray"] * bool(record["gray"])
    then += [f"blur {record['sigma']:.1f}"] if record["sigma"] > 0 else []
    return ", ".join(first), ", ".join(then)


# Neighbors: which training images are nearest to validation images.


def draw_neighbors(args, folder):
    """The Figure of a row for each validation image: it and the training images nearest to it."""
    train, val = image_folder(folder, "train"), image_folder(folder, "val")
    if args.checkpoint == UNTRAINED and not os.path.isfile(UNTRAINED):
        arch, checkpoint = args.arch or "resnet50", {"image_size": args.image_size or 224}
        check_image_size(arch, checkpoint["image_size"])
        with seeded(args.seed):
            network = backbone(base_encoder(arch, image_size=checkpoint["image_size"])).eval()
    else:
        network, checkpoint = backbone_of(args.checkpoint, args.arch, args.image_size)
        arch = checkpoint["arch"]
        print(printable(f"{args.checkpoint}: {checkpoint['taken']}"))
    epochs = f" after {checkpoint['epoch']} epochs" if checkpoint.get("epoch") else ""
    trained = own if isinstance(own := checkpoint.get("settings"), dict) else {}  # others may have any
    size = checkpoint["image_size"]
    gray_range = args.gray_range or trained.get("gray_range")
    check_image_size(arch, size)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"size": size, "resize": args.resize, "batch_size": 256, "gray_range": gray_range}
    settings["workers"] = available_cores() if args.workers is None else args.workers
    queries, nearest, cosines = neighbors_of(
        network, train, val, args.seed, args.count, args.neighbors, **settings
    )

    def view(images, index):
        pixels = read_pixels(paths_of(images)[index], gray_range)
        return _channels_last(center_resize(pixels, size, args.resize))

    tiles, pairs = [], []
    for index, near, near_cosines in zip(queries, nearest, cosines, strict=True):
        name = class_name(val, index)
        lines = [(text, BLACK) for text in factors(name)]
        tiles.append(Tile(view(val, index), f"image {index}", lines))
        for other, cosine in zip(near, near_cosines, strict=True):
            pairs.append((name, class_name(train, other)))
            tiles.append(Tile(view(train, other), f"cosine {cosine:.3f}", marks(*pairs[-1])))
    title = (
        f"Nearest of {len(train)} training images by the cosine of the features of\n"
        f"{printable(args.checkpoint)} ({arch}{epochs}), seed {args.seed}\n"
        f"{printable(folder)}, {size} x {size} pixels; {agreement(pairs)}"
    )
    print(agreement(pairs))
    return sheet(title, tiles, columns=1 + args.neighbors)


def neighbors_of(network, train, val, seed, count, number, **settings):
    """Arrays: the numbers of `count` validation images (count,), those of the training images nearest to each
    and their cosines, both (count, number), nearest first.

    network: gives features, in eval mode; train, val: ImageFolders; settings: of ValidationLoader. The
    validation images are drawn from `seed` alone, so they are the same for every network. Raises UserError.
    """
    _check_count("--count", count, val)
    _check_count("--neighbors", number, train)
    queries = np.random.default_rng(seed).permutation(len(val))[:count]
    some = copy.copy(val)
    some.samples, some.targets = ([of_all[i] for i in queries] for of_all in (val.samples, val.targets))
    settings["device"] = next(network.parameters()).device
    features = [F.normalize(embed(network, images, **settings)[0], dim=1) for images in (some, train)]
    cosines, nearest = neighbors(*features, number)
    return queries, nearest.numpy(), cosines.numpy()


def factors(name):
    """What is compared of a class: Trifeature's factors, of others its name."""
    return name.split("_") if is_combination(name) else [name]


def agreement(pairs):
    """What the classes in pairs have in common, in words: Trifeature's factors, or else themselves."""
    pairs = [(factors(one), factors(other)) for one, other in pairs]
    kinds = FACTORS if all(len(one) == len(other) == len(FACTORS) for one, other in pairs) else ["class"]
    same = [sum(one[place] == other[place] for one, other in pairs) for place in range(len(kinds))]
    counts = ", ".join(f"{kind} {many}" for kind, many in zip(kinds, same, strict=True))
    return f"of {len(pairs)} neighbors agree in {counts}"


def marks(name, other):
    """Lines of a Tile: what the class `other` shares with the class `name` and what not."""
    shared = factors(name)
    return [(f"✓ {text}", BLUE) if text in shared else (f"✗ {text}", RED) for text in factors(other)]


if __name__ == "__main__":
    run_program(main, "python -m moco.show")
