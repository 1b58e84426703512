"""The flags of linear evaluation, and the checks on them that need no data."""

from moco.errors import UserError
from moco.factors import FACTORS
from moco.linear_folder import LinearFolder
from moco.options import check_shared, folder_after_rates, shared_parser


def parse_args():
    parser = shared_parser(
        "Train a linear classifier on the frozen features of a pre-trained encoder.",
        epochs=100, lr=[30.0], schedule=[60, 80], weight_decay=0.0,
    )  # fmt: skip
    linear = parser.add_argument_group("linear evaluation (linear.jsonl in --output-dir is always written)")
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
        choices=tuple(FACTORS),
        help="predict this factor of Trifeature, not the folder's class",
    )
    return folder_after_rates(parser, parser.parse_args())


def check(args):
    """Refuse flags that cannot work, before anything is started."""
    check_shared(args)
    if args.evaluate and not goes_on(args):
        raise UserError("--evaluate needs the classifier to validate: --resume model_best.pth.tar")
    if args.evaluate:
        del args.lr[1:]  # a checkpoint's own entries are of one classifier, however it was trained


def notes(args, source):
    """What a user should know about this run, a line each. source: the checkpoint of the features."""
    yield f"features of {source}" if source else "no --pretrained: features of an untrained encoder"
    if args.pretrained and source != args.pretrained:
        yield f"note: --pretrained {args.pretrained} is not read: what goes on has its features"
    lrs = args.lr
    if len(lrs) > 1:
        yield f"{len(lrs)} classifiers; the lines of steps show the best so far, at first --lr {lrs[0]:g}"


def goes_on(args):
    """Whether there is a checkpoint that --resume asks for, whole or not."""
    if args.resume == "auto":
        return bool(LinearFolder(args.output_dir).newest_first())
    return bool(args.resume)
