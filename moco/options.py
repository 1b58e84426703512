"""The flags that both programs share, and the checks on them that need no data."""

import argparse
import math
from pathlib import Path

from moco.errors import UserError


def shared_parser(description, *, epochs, lr, schedule, weight_decay):
    """A parser with the flags of both programs; the keywords are the defaults in which they differ.

    lr: a list where the program takes several; then call folder_after_rates on what the parser gives.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    data = parser.add_argument_group("data")
    data.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        help="data set with train/ and val/ (or --dataset_root and --dataset)",
    )
    data.add_argument(
        "--dataset-root", "--dataset_root", metavar="ROOT", help="folder that holds the data set --dataset"
    )
    data.add_argument(
        "--dataset",
        default="imagenet100",
        help="its name; trifeature is drawn when missing (default: %(default)s)",
    )
    data.add_argument(
        "--image-size", type=int, default=224, metavar="S", help="side of a view (default: %(default)s)"
    )
    data.add_argument(
        "-j", "--workers", type=int, metavar="N", help="loader processes of this node (default: its cores)"
    )

    data.add_argument(
        "--device-aug",
        choices=("exact", "float", "off"),
        help="colours, blur and flip in batches on the device, as PIL (exact) or faster (float), or in the "
        "workers (off; default: exact on CUDA, off on a CPU)",
    )
    data.add_argument(
        "--resize",
        choices=("torch", "pil"),
        help="torch: faster, within 2 levels of PIL's (default: pil with --device-aug off, else torch)",
    )
    data.add_argument(
        "--decoder", choices=("pillow", "simplejpeg"), help="of JPEG files (default: simplejpeg if installed)"
    )

    data.add_argument(
        "--cache",
        choices=("decoded", "files", "device"),
        help="keep images in memory: their pixels, their files, or their pixels on the device (equal sizes)",
    )

    data.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="a training image that cannot be read ends the run, or another is taken instead and it is named "
        "after the epoch; in validation it always ends it (default: %(default)s)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "-a",
        "--arch",
        default="resnet50",
        help="torchvision model with a last layer fc (default: %(default)s)",
    )
    training.add_argument("--epochs", type=int, default=epochs, metavar="N", help="(default: %(default)s)")
    training.add_argument(
        "--start-epoch", type=int, default=0, metavar="N", help="first epoch (default: %(default)s)"
    )
    training.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="images of this node a step (default: %(default)s)",
    )
    training.add_argument(
        "--schedule",
        type=int,
        nargs="*",
        default=schedule,
        metavar="EPOCH",
        help="lr x 0.1 at each (default: %(default)s)",
    )
    training.add_argument(
        "--momentum", type=float, default=0.9, metavar="M", help="of SGD (default: %(default)s)"
    )
    training.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=float, default=weight_decay, metavar="W",
        help="(default: %(default)s)",
    )  # fmt: skip
    several = {"type": _number_or_word, "nargs": "+"} if isinstance(lr, list) else {"type": float}
    training.add_argument(
        "--lr", "--learning-rate", dest="lr", default=lr, metavar="LR", **several,
        help=("one or several: a classifier for each in one pass, the best is kept " * isinstance(lr, list))
        + "(default: %(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--seed", type=int, metavar="N", help="same seed, same run (default: drawn and printed)"
    )

    speed = parser.add_argument_group("speed (off by default: float32, as published)")
    speed.add_argument(
        "--fast", action="store_true",
        help="all of these that help on this device and keep the mathematics; listed at the start",
    )  # fmt: skip
    speed.add_argument(
        "--amp", choices=("bf16", "fp16"), help="compute encoders in it; losses and weights stay float32"
    )
    speed.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="interleave channels in memory"
    )
    speed.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the encoders; the start takes longer",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", default=".", metavar="DIR", help="for all files written (default: here)")
    run.add_argument(
        "--resume",
        default="",
        metavar="CKPT",
        help="continue from this checkpoint of the program, or with auto from the newest in --output-dir",
    )
    run.add_argument(
        "-p", "--print-freq", type=int, default=10, metavar="N", help="steps (default: %(default)s)"
    )

    processes = parser.add_argument_group(
        "processes (none of these for one process; torchrun sets them itself)"
    )
    processes.add_argument(
        "--multiprocessing-distributed", action="store_true", help="start one process per GPU of this node"
    )
    processes.add_argument("--world-size", type=int, default=-1, metavar="N", help="number of nodes")
    processes.add_argument(
        "--rank", type=int, default=-1, metavar="R", help="place of this node among them, from 0"
    )
    processes.add_argument(
        "--dist-url", metavar="URL", help="where they meet, as tcp://HOST:PORT (default: a free port)"
    )
    processes.add_argument("--dist-backend", metavar="NAME", help="(default: nccl on GPUs, gloo without)")
    processes.add_argument("--gpu", type=int, metavar="N", help="use this GPU alone")
    return parser


def folder_after_rates(parser, args):
    """`args`, with DIR taken out of the values of --lr where it comes after them, as in --lr 30 DIR."""
    if isinstance(args.lr[-1], str) and args.folder is None:
        *args.lr, args.folder = args.lr
    words = [value for value in args.lr if isinstance(value, str)]
    if words or not args.lr:
        parser.error(f"argument --lr: {words[0]!r} is no number" if words else "argument --lr: no number")
    return args


def check_shared(args):
    """Raise UserError for a value of a shared flag that cannot work."""
    for name in ("epochs", "batch_size", "print_freq"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("start_epoch", "momentum", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    rates = args.lr if isinstance(args.lr, list) else [args.lr]
    for lr in rates:
        if not 0 < lr < math.inf:
            raise UserError(f"--lr must be above 0, not {lr}")
        if rates.count(lr) > 1:
            raise UserError(f"--lr has {lr:g} more than once; give each value once")
    if args.image_size < 8:
        raise UserError(f"--image-size must be at least 8 pixels, not {args.image_size}")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 (load in the training process) or more, not {args.workers}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63 - 1, not {args.seed}")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if args.on_bad_image == "skip" and args.cache in ("decoded", "device"):
        raise UserError(
            f"--cache {args.cache} decodes all images before training and cannot skip one; use --cache files "
            "or remove what python -m moco.check names"
        )
    if args.cache == "device" and args.resize:
        raise UserError(
            "--cache device cuts views out on the device, not by PIL or torch: leave out --resize"
        )
    if args.resume not in ("", "auto") and not Path(args.resume).is_file():
        raise UserError(f"--resume: there is no file {args.resume}; to start anew leave the flag out")


def _number_or_word(text):
    try:
        return float(text)
    except ValueError:
        return text
