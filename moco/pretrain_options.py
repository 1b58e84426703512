"""The flags of pre-training, the checks on them that need no data, and what a user should know about them."""

import math

from moco import losses
from moco.errors import UserError
from moco.options import check_shared, shared_parser
from moco.random_bits import MOST
from moco.run_log import summary_writer


def parse_args(arguments=None):
    """The flags, of `arguments` (default: of the command line)."""
    parser = shared_parser(
        "Pre-train an encoder without labels by momentum contrast, with or without IFM.",
        epochs=200, lr=0.03, schedule=[120, 160], weight_decay=1e-4,
    )  # fmt: skip
    moco = parser.add_argument_group("MoCo (v2 is --mlp --moco-t 0.2 --aug-plus --cos)")
    moco.add_argument(
        "--moco-dim", type=int, default=128, metavar="C", help="feature length (default: %(default)s)"
    )
    moco.add_argument(
        "--moco-k", type=int, default=65536, metavar="K", help="keys in the queue (default: %(default)s)"
    )
    moco.add_argument(
        "--moco-m", type=float, default=0.999, metavar="M", help="key momentum (default: %(default)s)"
    )
    moco.add_argument(
        "--moco-t", type=float, default=0.07, metavar="T", help="temperature (default: %(default)s)"
    )
    moco.add_argument("--mlp", action="store_true", help="give the head MoCo v2's hidden layer")
    moco.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation, with blur")
    moco.add_argument(
        "--crops-only",
        action="store_true",
        help="crops and flips alone, for data whose colours are to be learned",
    )
    moco.add_argument("--cos", action="store_true", help="cosine learning rate instead of --schedule")
    moco.add_argument(
        "--bn-splits", type=int, default=1, metavar="G",
        help="BatchNorm over G groups in one process, as G processes have (upstream: 8 GPUs; default: off)",
    )  # fmt: skip
    ifm = parser.add_argument_group("implicit feature modification")
    ifm.add_argument(
        "--method",
        choices=("ifm", "ifm_only"),
        help="add the perturbed loss, or use it alone (default: plain InfoNCE)",
    )
    ifm.add_argument("--epsilon", type=float, metavar="E", help="step of the perturbation (default: 0.1)")
    ifm.add_argument("--alpha", type=float, metavar="A", help="weight of the perturbed loss (default: 1.0)")
    experiments = parser.add_argument_group("experiments")
    experiments.add_argument(
        "--random-bits", type=int, default=0, metavar="B",
        help="give every image B random bits of its own as channels that its views share (default: none)",
    )  # fmt: skip
    experiments.add_argument(
        "--recolor",
        action="store_true",
        help="give each view of Trifeature's pictures in white one of its ten colors at random",
    )
    keeping = parser.add_argument_group("checkpoints")
    keeping.add_argument(
        "--keep",
        type=int,
        default=1,
        metavar="N",
        help="how many of the newest epochs' (default: %(default)s)",
    )
    keeping.add_argument(
        "--save-freq",
        type=int,
        default=0,
        metavar="N",
        help="keep every N-th epoch's besides (default: none)",
    )
    seeing = parser.add_argument_group("seeing the run (log.jsonl in --output-dir is always written)")
    seeing.add_argument(
        "--knn", type=int, default=0, metavar="N",
        help="after every N-th epoch and the last, classify val/ by the nearest neighbours in train/ "
        "(default: never)",
    )  # fmt: skip
    seeing.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the log for TensorBoard too (pip install tensorboard)",
    )
    return parser.parse_args(arguments)


def check(args):
    """Fill in the defaults of IFM and refuse flags that contradict each other, before anything is started."""
    check_shared(args)
    if args.method is None and (args.epsilon is not None or args.alpha is not None):
        raise UserError("--epsilon and --alpha belong to IFM; add --method ifm, or leave them out")
    if args.method == "ifm_only" and args.alpha is not None:
        raise UserError(
            "--alpha weighs the perturbed loss against the plain one, which --method ifm_only does not have"
        )
    if args.method:
        args.epsilon = 0.1 if args.epsilon is None else args.epsilon
        args.alpha = 1.0 if args.alpha is None else args.alpha
        for name in ("epsilon", "alpha"):
            if not 0 <= getattr(args, name) < math.inf:
                raise UserError(f"--{name} must be 0 or more, not {getattr(args, name)}")
    if args.crops_only and args.aug_plus:
        raise UserError("--crops-only is a recipe without the operations of --aug-plus; give one of the two")
    if not 0 <= args.random_bits <= MOST:
        raise UserError(f"--random-bits must be between 0 and {MOST}, not {args.random_bits}")
    if args.recolor and not args.crops_only:
        raise UserError("--recolor takes views as --crops-only makes them; add that flag")
    if args.random_bits and args.knn:
        raise UserError("--knn looks at pictures alone, without --random-bits; leave one of them out")
    if not 0 <= args.moco_m <= 1:
        raise UserError(f"--moco-m must be between 0 and 1, not {args.moco_m}")
    if not 0 < args.moco_t < math.inf:
        raise UserError(f"--moco-t must be above 0, not {args.moco_t}")
    for name in ("moco_dim", "moco_k", "bn_splits", "keep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")

    for name, what in (("save_freq", "none"), ("knn", "never")):
        if getattr(args, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be 0 ({what}) or more, not {getattr(args, name)}"
            )
    if args.tensorboard:
        summary_writer()


def notes(args, chance, images, batchnorm_groups):
    """What a user should know about this run, each in lines of at most 80 letters."""
    of_ifm = f", {chance:.4f} with IFM's perturbed loss" if args.method else ""
    yield (
        f"at chance the loss is ln(1+K) = {losses.chance(args.moco_k):.4f}{of_ifm};\n"
        "   it starts lower, rises while the queue fills, then falls"
    )
    if batchnorm_groups == 1:
        yield (
            "note: shuffling within one BatchNorm group hides nothing: by the statistics that\n"
            "   a query and its key share, the model can find its positives;\n"
            "   --bn-splits 8 gives what 8 GPUs have"
        )
    if args.moco_k > images:
        yield (
            f"warning: a queue of {args.moco_k} keys holds every one of {images} images more than once,\n"
            "   so an image is contrasted with itself; lower --moco-k"
        )
