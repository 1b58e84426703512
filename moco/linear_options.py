"""The flags of linear evaluation, and the checks on them that need no data."""

from pathlib import Path

from moco import trifeature
from moco.errors import UserError
from moco.options import check_shared, folder_after_rates, shared_parser


def parse_args():
    parser = shared_parser(
        "Train a linear classifier on the frozen features of a pre-trained encoder.",
        epochs=100, lr=[30.0], schedule=[60, 80], weight_decay=0.0,
    )  # fmt: skip
    linear = parser.add_argument_group("linear evaluation")
    linear.add_argument(
        "--pretrained",
        default="",
        metavar="CKPT",
        help="checkpoint or released model (default: untrained)",
    )
    linear.add_argument(
        "-e", "--evaluate", action="store_true", help="only validate the classifier of --resume"
    )
    linear.add_argument(
        "--target",
        choices=tuple(trifeature.FACTORS),
        help="predict this factor of Trifeature, not the folder's class",
    )
    return folder_after_rates(parser, parser.parse_args())


def check(args):
    """Refuse flags that cannot work, and put the checkpoint that --resume auto means in its place."""
    check_shared(args)
    if args.resume == "auto":
        newest = newest_in(args.output_dir)
        args.resume = str(newest) if newest.is_file() else ""
        print(f"--resume auto: {args.resume or 'nothing to go on from yet'}")
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs the classifier to validate: --resume model_best.pth.tar")


def newest_in(output_dir):
    """The path of the newest checkpoint, whether there is one or not."""
    return Path(output_dir) / "checkpoint.pth.tar"


def what_is_kept(newest, args):
    """Where a run that is stopped goes on. newest: the checkpoint of its last finished epoch, or ""."""
    if args.evaluate:
        return "the validation is not finished"
    if not newest:
        return "no epoch is finished, so nothing is saved"
    resume = "auto" if Path(newest) == newest_in(args.output_dir) else newest
    return f"the last finished epoch is in {newest}; --resume {resume} goes on from there"
