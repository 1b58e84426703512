"""Writes the features of images under the frozen encoder of a checkpoint into a file for NumPy.

    python -m moco.embed checkpoint_0199.pth.tar DIR features.npz
    python -m moco.embed ifm-eps0.1 DIR features.npy      (and features.csv, features.json beside it)

What is in the files: moco/evaluate/README.md.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported: moco/run/README.md, "Threads"

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from moco.data.folders import labeled_by_folder, paths_of, pretraining_images
from moco.data.gray import range_warnings, uses_of_some
from moco.encoders import check_image_size
from moco.errors import Parser, UserError, first_line, printable, run_program
from moco.evaluate.feature_file import check_writable, write_features
from moco.evaluate.features import backbone_of, embed, with_head
from moco.files import sha256
from moco.options import add_gray_range
from moco.run.resources import available_cores
from moco.zoo import resolve


def main():
    args = parse_args()
    check_writable(args.out, args.force)
    device = device_of(args.device)
    images = pretraining_images(args.folder, args.images)
    if args.images is None:
        images = labeled_by_folder(images)
    path = resolve(args.checkpoint)
    network, checkpoint = backbone_of(path, args.arch, args.image_size)
    arch, size = checkpoint["arch"], checkpoint["image_size"]
    check_image_size(arch, size)
    if args.layer == "head":
        network = with_head(network, checkpoint, path)
    reading = {
        "image_size": size,
        "resize": args.resize or checkpoint["resize"],
        "gray_range": args.gray_range or checkpoint["gray_range"],
    }
    identity = {"checkpoint": args.checkpoint, "sha256": sha256(path), "arch": arch, "layer": args.layer}

    print(*map(printable, images.summary()), sep="\n")
    if reading["gray_range"] is None:
        for line in range_warnings(uses_of_some(paths_of(images))):
            print(printable(line))
    labels = f"{len(images.classes):,} classes, by folder" if images.classes else "none"
    print(f"labels: {labels}; {size} x {size} pixels, resize {reading['resize']}, on {device}")
    print(printable(f"{args.checkpoint}: {arch}, {checkpoint['taken']}"), flush=True)
    features, targets = embed(
        network.to(device),
        images,
        device,
        size=size,
        batch_size=args.batch_size,
        workers=available_cores() if args.workers is None else args.workers,
        resize=reading["resize"],
        gray_range=reading["gray_range"],
        skip_bad=args.on_bad_image == "skip",
        advice="--on-bad-image skip leaves such images out",
    )
    readable = targets >= 0
    if not readable.all():
        features, targets = features[readable], targets[readable]
    if not len(features):
        raise UserError(f"none of the {len(images)} images can be read; nothing is written")
    if args.layer == "head":
        features = F.normalize(features, dim=1)
    if not features.isfinite().all():
        raise UserError(f"{args.checkpoint} gives features that are not finite; take one of a healthy run")
    folder = os.path.dirname(args.images) if args.images else str(Path(args.folder))
    names = [name.removeprefix(os.path.join(folder, "")) for name in paths_of(images)]
    arrays = {"features": features.numpy(), "paths": np.array(names)[readable.numpy()]}
    if images.classes:
        arrays |= {"labels": targets.numpy(), "classes": np.array(images.classes)}
    write_features(args.out, arrays | {"checkpoint": np.array(json.dumps(identity | reading))})
    rows, columns = features.shape
    print(printable(f"{rows:,} x {columns} features of {args.checkpoint} -> {args.out}"))


def parse_args():
    parser = Parser(
        prog="python -m moco.embed",
        description="Write the features of images under the frozen encoder of a checkpoint: float32 N x D, "
        "with the images' paths and, where they are in class folders, their labels.",
        epilog="OUT.npz holds everything. Beside OUT.npy, which has the features alone, OUT.csv has paths "
        "and labels, and OUT.json says which checkpoint it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "file of this or another program, or a released model's name (python -m moco.zoo list)"
    add("checkpoint", metavar="CKPT", help=text)
    text = "images as for pre-training: those of DIR/train, or without it all below DIR"
    add("folder", metavar="DIR", nargs="?", help=text)
    add("out", metavar="OUT", help="file to write, .npz or .npy")
    add("--images", metavar="LIST", help="instead of DIR, as for main_moco.py; without labels")
    text = (
        "input of the classifier, or MoCo's head: rows of length 1, as the loss sees them (default: backbone)"
    )
    add("--layer", choices=("backbone", "head"), default="backbone", help=text)
    add("-a", "--arch", help="as in training (default: what the checkpoint says, or else resnet50)")
    add("--image-size", type=int, metavar="S", help="side of the view (default: the checkpoint's, or 224)")
    add("--resize", choices=("pil", "torch"), help="as in training (default: the checkpoint's, or pil)")
    add_gray_range(add)
    text = "skip: name it and leave it out (default: error)"
    add("--on-bad-image", choices=("error", "skip"), default="error", help=text)
    add(
        "-b",
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images at a time (default: %(default)s)",
    )
    add("-j", "--workers", type=int, metavar="W", help="loader processes (default: one per core)")
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--force", action="store_true", help="replace OUT, and what is beside an .npy, if it exists")
    args = parser.parse_intermixed_args()  # DIR may be left out, and flags stand between the others
    if (args.folder is None) == (args.images is None):
        raise UserError("give the folder DIR of the images or a list of --images, one of them: CKPT DIR OUT")
    for name, least in (("image_size", 8), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
    return args


def device_of(name):
    """The torch.device of --device. Raises UserError when torch cannot use it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}); leave it out") from error
    return device


if __name__ == "__main__":
    run_program(main, "python -m moco.embed")
