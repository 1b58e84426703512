"""The flags of moco.shortcuts and the checks on them alone."""

import argparse

from moco.errors import UserError
from moco.factors import WHITE

RECIPES = {"v2": "--aug-plus", "crops": "--crops-only"}
MOST_ON_GPU = 12  # runs side by side on one, each of which keeps a core busy, too
ALPHA, RENDERS = 1.0, 4  # unless given


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m moco.shortcuts",
        description="Pre-train small encoders by main_moco.py with and without IFM, and measure what a "
        "linear classifier reads from them.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="EXPERIMENT")
    for kind, text in (
        ("trifeature", "how well shape, texture and colour are read, against epsilon and temperature"),
        ("randbit", "how well images are read that random bits tell apart, against the number of bits"),
    ):
        usage = f"python -m moco.shortcuts {kind} --out DIR [options]"
        sub = kinds.add_parser(kind, help=text, description=f"Measures {text}.", usage=usage)
        _add_lists(sub, kind)
        _add_fixed(sub, kind)
        _add_running(sub)
    return parser.parse_args()


def _add_lists(parser, kind):
    of_bits = kind == "randbit"
    add = parser.add_argument_group("what differs between runs (every combination is one)").add_argument
    if of_bits:
        add("--bits", type=int, nargs="*", default=[0, 2, 4, 6, 8], metavar="B",
            help="random bits of each image (default: 0 2 4 6 8)")  # fmt: skip
    epsilons = [0, 0.1] if of_bits else [0, 0.05, 0.1, 0.2, 0.5]
    temperatures = [0.2] if of_bits else [0.07, 0.2, 0.5]
    add("--epsilon", type=float, nargs="*", default=epsilons, metavar="E",
        help=f"0 is plain MoCo-v2 (default: {_words(epsilons)})")  # fmt: skip
    add("--moco-t", type=float, nargs="*", default=temperatures, metavar="T",
        help=f"temperatures (default: {_words(temperatures)})")  # fmt: skip
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], metavar="N", help="a run each (default: 0 1 2)")
    recipes = ["v2"] if of_bits else ["v2", "crops"]
    add("--recipe", nargs="*", default=recipes, metavar="NAME",
        help=f"views: v2, MoCo v2's, or crops and flips alone (default: {_words(recipes)})")  # fmt: skip


def _add_fixed(parser, kind):
    add = parser.add_argument_group("what all runs share (as in main_moco.py)").add_argument
    for flag, default, metavar in (
        ("-a --arch", "resnet18", "ARCH"), ("--image-size", 32, "S"), ("--epochs", 12, "N"),
        ("-b --batch-size", 64, "N"), ("--lr", 0.03, "LR"), ("--moco-k", 1024, "K"), ("--moco-m", 0.99, "M"),
        ("--bn-splits", 8, "G"),
    ):  # fmt: skip
        add(
            *flag.split(), type=type(default), default=default, metavar=metavar, help="(default: %(default)s)"
        )
    add("--method", choices=("ifm", "ifm_only"), help="of epsilons above 0 (default: ifm)")
    add("--alpha", type=float, metavar="A", help=f"weight of ifm's perturbed loss (default: {ALPHA})")
    add("--renders", type=int, metavar="N",
        help=f"images of each of Trifeature's combinations (default: {RENDERS})")  # fmt: skip
    add("--hide", metavar="FACTOR[=VALUE]",
        help="a factor of Trifeature of which all images have one value, the first unless named")  # fmt: skip
    add("--read-without", metavar="FACTOR[=VALUE]",
        help="read from other pictures than are trained on, in which this factor has one value")  # fmt: skip
    if kind == "trifeature":
        add("--recolor", action="store_true", default=None,
            help="give each view a color of its own; needs --hide color=white, --recipe crops")  # fmt: skip
        add("--renew-statistics", action="store_true", default=None,
            help="also read with BatchNorm's statistics of the training images that are read")  # fmt: skip
    if kind == "randbit":
        add("--data", metavar="DIR", help="images with train/ and val/ (default: Trifeature, drawn into OUT)")
    add("--factors", nargs="*", metavar="NAME",
        help="what to read: shape, texture, color; of other data class (default: all there are)")  # fmt: skip


def _add_running(parser):
    add = parser.add_argument_group("running").add_argument
    add(
        "--out", required=True, metavar="DIR", help="folder of the sweep: results.jsonl, table.md, figure.png"
    )
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    add("--jobs", type=int, metavar="N",
        help=f"runs side by side (default: one per core, at most {MOST_ON_GPU} on a GPU)")  # fmt: skip
    add("--keep-checkpoints", action="store_true", help="do not remove them once they are measured")


def check_lists(args):
    """Refuse empty lists, names that are none, and flags without an effect. UserError.

    Keeps each value of a list once, and gives flags their defaults where they have an effect.
    """
    for name in ("bits", "epsilon", "moco_t", "seeds", "recipe", "factors"):
        values = getattr(args, name, None)
        if values == []:
            raise UserError(f"--{name.replace('_', '-')} needs at least one value")
        if values is not None:
            setattr(args, name, list(dict.fromkeys(values)))  # each once
    args.epsilon = list(dict.fromkeys(epsilon + 0.0 for epsilon in args.epsilon))  # -0.0 is 0.0
    for recipe in args.recipe:
        if recipe not in RECIPES:
            raise UserError(f"there is no recipe {recipe!r}; choose of {', '.join(RECIPES)}")
    if getattr(args, "recolor", None) and (args.hide != WHITE or args.recipe != ["crops"]):
        raise UserError(
            f"--recolor gives colors to views of white pictures; add --hide {WHITE} --recipe crops"
        )
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if args.renders is not None and args.renders < 1:
        raise UserError(f"--renders must be at least 1, not {args.renders}")
    if not any(args.epsilon) and not (args.method is None is args.alpha):
        raise UserError("--method and --alpha have no effect at --epsilon 0 alone; leave them out")
    args.method = args.method or "ifm"
    if args.method == "ifm":
        args.alpha = ALPHA if args.alpha is None else args.alpha
    elif args.alpha is not None:
        raise UserError(f"--alpha has no effect with --method {args.method}; leave one of them out")
    if getattr(args, "data", None) is None:
        args.renders = args.renders or RENDERS
        return
    for name in ("renders", "hide", "read_without"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} draws Trifeature, and --data takes other images; leave one of them out"
            )


def _words(values):
    return " ".join(map(str, values))
